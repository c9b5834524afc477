"""On a GPU with vLLM: an adapter of experts gives a row the same bits in any company, and leaves other rows alone."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
EXPERTS, TOP_K, SLOTS, RANK = 32, 8, 4, 64


def _case(k: int, n: int, slices: int, tokens: int):
    generator = torch.Generator("cuda").manual_seed(k)

    def made(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, device="cuda") * scale).bfloat16()

    a = [made(SLOTS, EXPERTS, RANK, k, scale=k**-0.5) for _ in range(slices)]
    b = [made(SLOTS, EXPERTS, n, RANK, scale=RANK**-0.5) for _ in range(slices)]
    x = made(tokens if slices == 2 else tokens * TOP_K, k)
    y = made(tokens * TOP_K, slices * n)
    ids = torch.rand(tokens, EXPERTS, generator=generator, device="cuda").topk(TOP_K).indices.int()
    mapping = ((torch.arange(tokens, device="cuda") * 7) % (SLOTS + 1) - 1).int()
    weights = torch.rand(tokens, TOP_K, generator=generator, device="cuda") if slices == 1 else None
    return a, b, x, y, ids, mapping, weights


def _blocks(ids, mapping, enabled, alone: bool):
    """As PunicaWrapperGPU.moe_lora_align_block_size."""
    from vllm import _custom_ops

    from bi_patch.kernels.triton import expert_lora

    slots = torch.tensor([-1, *range(SLOTS)], dtype=torch.int32, device="cuda")
    if alone:
        return expert_lora.Blocks(None, ids.reshape(-1), None, mapping, slots, enabled, SLOTS + 1)
    size = expert_lora.BLOCK_M
    length = ids.numel() + EXPERTS * (size - 1) if ids.numel() >= EXPERTS else ids.numel() * size
    blocks = -(-length // size)
    rows = torch.empty(SLOTS * length, dtype=torch.int32, device="cuda")
    experts = torch.full((SLOTS * blocks,), -1, dtype=torch.int32, device="cuda")
    padded = torch.empty(SLOTS, dtype=torch.int32, device="cuda")
    _custom_ops.moe_lora_align_block_size(
        ids, mapping, EXPERTS, size, SLOTS, length, blocks, rows, experts, padded, enabled, slots, None
    )
    return expert_lora.Blocks(rows, experts, padded, mapping, slots, enabled, SLOTS + 1)


def _loop(a, b, x, y, ids, mapping, enabled, weights, i):
    """Row i in fp64."""
    slot, expert = int(mapping[i // TOP_K]), int(ids.reshape(-1)[i])
    if slot < 0 or not enabled[slot]:
        return y[i].double()
    row = x[i // TOP_K if len(x) < len(y) else i].double()
    d = torch.cat([q[slot, expert].double() @ (p[slot, expert].double() @ row) for p, q in zip(a, b)])
    return y[i].double() + (d if weights is None else d * weights.reshape(-1)[i].double())


@pytest.mark.parametrize("k,n,slices", [(2048, 768, 2), (768, 2048, 1), (300, 136, 1)])
def test_a_row_in_any_company(k, n, slices):
    from bi_patch.kernels.triton import expert_lora

    tokens = 700
    a, b, x, y, ids, mapping, weights = _case(k, n, slices, tokens)
    enabled = torch.tensor([1, 1, 0, 1, 0], dtype=torch.int32, device="cuda")

    def run(at, way="", alone=False):
        lines = (at[:, None] * TOP_K + torch.arange(TOP_K, device="cuda")).flatten()
        got, given = y[lines].clone(), (x[at] if slices == 2 else x[lines])
        part = None if weights is None else weights[at].reshape(-1)
        blocks = _blocks(ids[at].contiguous(), mapping[at].contiguous(), enabled, alone)
        expert_lora.expert_lora(got, given, a, b, blocks, part, TOP_K, way=way)
        return got.view(len(at), TOP_K, -1)

    whole = torch.arange(tokens, device="cuda")
    want = run(whole)
    for way in ("fused", "whole"):
        for alone in (True, False):
            assert torch.equal(run(whole, way, alone), want), (way, alone)
    for count in (1, 2, 3, 8, 16, 17, 33, 64, 128, 300):
        for alone in (True, False):
            assert torch.equal(run(whole[:count], alone=alone), want[:count]), (count, alone)
            assert torch.equal(run(whole[-count:], alone=alone), want[-count:]), (count, alone)
    order = torch.randperm(tokens, device="cuda")
    assert torch.equal(run(order), want[order])
    one = (mapping == 1).nonzero().flatten()
    assert torch.equal(run(one), want[one])
    assert len(one) and not torch.equal(want, y.view(tokens, TOP_K, -1))
    untouched = (mapping < 0) | (enabled[mapping.clamp_min(0).long()] == 0)
    assert torch.equal(want[untouched], y.view(tokens, TOP_K, -1)[untouched])
    rows = want.view(tokens * TOP_K, -1)
    for i in range(0, 200, 7):
        exact = _loop(a, b, x, y, ids, mapping, enabled, weights, i)
        assert float((rows[i].double() - exact).norm() / exact.norm()) < 8e-3
