"""On a GPU: a row of an expert with packed weights has the bits of the dense product, in every form and company."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
EXPERTS, N, K, TOP = 6, 272, 768, 2


def made(group, zeros, bias, dtype):
    from bi_patch.kernels.packing import pack_experts

    generator = torch.Generator("cuda").manual_seed(group)
    q = torch.randint(0, 16, (EXPERTS, N, K), generator=generator, device="cuda", dtype=torch.uint8)
    scale = (torch.rand((EXPERTS, N, K // group), generator=generator, device="cuda") * 0.01 + 0.002).to(dtype)
    zero = None
    if zeros:
        zero = torch.randint(0, 16, scale.shape, generator=generator, device="cuda", dtype=torch.uint8)
    added = torch.randn((EXPERTS, N), generator=generator, device="cuda").to(dtype) if bias else None
    return pack_experts(q, scale, zero), added


@pytest.mark.parametrize(
    ("group", "zeros", "bias", "dtype"),
    [(128, False, True, torch.bfloat16), (32, True, False, torch.float16), (64, True, True, torch.bfloat16)],
)
@pytest.mark.parametrize("tokens", [1, 9, 150])
def test_every_form_has_the_bits_of_the_dense_product(group, zeros, bias, dtype, tokens):
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    from bi_patch.kernels.cuda import packed

    held, added = made(group, zeros, bias, dtype)
    x = torch.randn(tokens, K, device="cuda").to(dtype)
    x[:, K // 2 :] = x[:, : K // 2].flip(1) * -1.03  # sums that cancel show another order
    chosen = torch.randint(0, 2, (tokens, TOP), device="cuda", dtype=torch.int32) * 3
    chosen += torch.arange(TOP, device="cuda", dtype=torch.int32) * 2
    chosen[: tokens // 2, 1] = 4  # expert 1 has no rows, and expert 4 has many
    flat, elsewhere, ids = chosen.flatten(), 2, tokens * TOP
    want, twice = (torch.zeros((ids, N), dtype=dtype, device="cuda") for _ in range(2))
    dense = packed.Form(4, 4, 8, True)
    for expert in set(flat.tolist()) - {elsewhere}:
        mine = (flat == expert).nonzero().flatten()
        own = held._replace(
            data=held.data.view(EXPERTS, -1)[expert].clone(),
            scale=held.scale[expert].contiguous(),
            zero=None if held.zero is None else held.zero[expert].contiguous(),
        )
        bias_of = None if added is None else added[expert].contiguous()
        want[mine] = packed.product(x[mine // TOP], own, bias_of, dense)
        # The least fp16 floats are rounded after the doubling alone.
        twice[mine] = packed.product(x[mine // TOP] * 2, own, None if added is None else bias_of * 2, dense)
    here = torch.arange(EXPERTS, device="cuda", dtype=torch.int32)
    here[elsewhere] = -1
    doubles = torch.full((ids,), 2.0, device="cuda")
    for form in packed.FORMS_OF_EXPERTS:
        rows = moe_align_block_size(chosen, 8 * form.tiles, EXPERTS, here)
        for factors in (None, doubles):
            out = torch.full((ids, N), torch.nan, dtype=dtype, device="cuda")
            packed.product_of_experts(x, held, packed.Rows(*rows, TOP, ids, factors), added, form, out)
            assert torch.equal(out, want if factors is None else twice), (form, factors is None)


def test_a_launch_may_be_captured():
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    from bi_patch.kernels.cuda import packed

    held, _ = made(128, False, False, torch.bfloat16)
    x = torch.randn(40, K, device="cuda").bfloat16()
    chosen = torch.randint(0, EXPERTS, (40, 1), device="cuda", dtype=torch.int32)
    form = packed.form_of_experts(40, EXPERTS, N, K)
    out, again = (torch.zeros((40, N), dtype=x.dtype, device="cuda") for _ in range(2))
    rows = packed.Rows(*moe_align_block_size(chosen, 8 * form.tiles, EXPERTS), 1, 40)
    packed.product_of_experts(x, held, rows, None, form, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed.product_of_experts(x, held, rows, None, form, again)
    graph.replay()
    assert torch.equal(out, again) and out.any()


def floats(k, scaled):
    """Random floats e2m1 of experts, with exponents or with scales in e4m3 and a number of each expert."""
    from bi_patch.kernels.packing import pack_float_experts, pack_scaled_experts

    generator = torch.Generator("cuda").manual_seed(k)
    q = torch.randint(0, 16, (EXPERTS, N, k), generator=generator, device="cuda", dtype=torch.uint8)
    if not scaled:
        exponent = torch.randint(117, 121, (EXPERTS, N, k // 32), generator=generator, device="cuda")
        return pack_float_experts(q, exponent.to(torch.uint8))
    scale = (32 * (0.5 + torch.rand((EXPERTS, N, k // 16), generator=generator, device="cuda"))).to(torch.float8_e4m3fn)
    return pack_scaled_experts(q, scale, torch.rand(EXPERTS, generator=generator, device="cuda") * 0.001)


# The second K is not a multiple of 128.
@pytest.mark.parametrize(("k", "scaled"), [(768, False), (416, False), (768, True)])
@pytest.mark.parametrize("tokens", [1, 9, 150])
def test_every_form_has_the_bits_of_the_dense_product_of_floats(k, scaled, tokens):
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    from bi_patch.kernels.cuda import packed

    held, added = floats(k, scaled), torch.randn((EXPERTS, N), device="cuda").bfloat16()
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    x[:, k // 2 :] = x[:, : k // 2].flip(1) * -1.03  # sums that cancel show another order
    chosen = torch.randint(0, EXPERTS // TOP, (tokens, TOP), device="cuda", dtype=torch.int32) * TOP
    chosen += torch.arange(TOP, device="cuda", dtype=torch.int32)
    flat, ids = chosen.flatten(), tokens * TOP
    want = torch.zeros((ids, N), dtype=x.dtype, device="cuda")
    wide, one = torch.nn.functional.pad(x, (0, held.shape[1] - k)), torch.ones((), device="cuda")
    for expert in set(flat.tolist()):
        mine = (flat == expert).nonzero().flatten()
        own = held._replace(
            data=held.data.view(EXPERTS, -1)[expert].clone(),
            scale=held.scale[expert].clone(),
            whole=held.whole[expert].clone() if scaled else one,
        )
        want[mine] = packed.product(wide[mine // TOP], own, added[expert].clone(), packed.Form(4, 4, 8, True))
    doubles = torch.full((ids,), 2.0, device="cuda")
    for form in packed.FORMS_OF_EXPERTS:
        rows = moe_align_block_size(chosen, 8 * form.tiles, EXPERTS)
        for factors in (None, doubles):
            out = torch.full((ids, N), torch.nan, dtype=x.dtype, device="cuda")
            packed.product_of_experts(x, held, packed.Rows(*rows, TOP, ids, factors), added, form, out)
            assert torch.equal(out, want if factors is None else want * 2), (form, factors is None)
