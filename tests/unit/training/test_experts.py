"""The choice of experts and the experts: gradients against autograd in double precision."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from bi_patch.errors import MissingDependency, UnsupportedDevice
from bi_patch.ops import bits
from bi_patch.ops.cpu import machine
from bi_patch.training import devices, ops
from bi_patch.training.cpu import experts

ROWS, HIDDEN, INNER, EXPERTS, CHOSEN = 9, 32, 64, 6, 2


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("renormalize", [False, True])
def test_route(renormalize):
    logits = randn(ROWS, EXPERTS)
    single, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weights, ids = ops.route(single, CHOSEN, renormalize)
    want, chosen = double.softmax(-1).topk(CHOSEN, dim=-1)
    want = want / want.sum(-1, keepdim=True) if renormalize else want
    assert torch.equal(ids.long(), chosen) and not ids.requires_grad
    torch.testing.assert_close(weights.double(), want)
    mixed = randn(ROWS, CHOSEN, seed=1)
    (weights * mixed).sum().backward()
    (want * mixed.double()).sum().backward()
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gradients_of_experts(kind):
    plain = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }[kind]
    weights, ids = ops.route(randn(ROWS, EXPERTS), CHOSEN, True)
    given = [randn(ROWS, HIDDEN), weights, randn(EXPERTS, 2 * INNER, HIDDEN, seed=1), randn(EXPERTS, HIDDEN, INNER)]
    x, share, gate_up, down = (t.double().requires_grad_() for t in given)
    gate, up = torch.einsum("rc,rkdc->rkd", x, gate_up[ids.long()]).chunk(2, -1)
    out = torch.einsum("rkd,rkcd,rk->rc", plain(gate) * up, down[ids.long()], share)
    grad = randn(ROWS, HIDDEN, seed=2)
    out.backward(grad.double())
    found = torch.ops.bi_training.experts_backward(grad, given[0], weights, ids, given[2], given[3], kind, True, True)
    for got, want in zip(found, (x.grad, share.grad, gate_up.grad, down.grad), strict=True):
        scale = float(want.abs().max())
        torch.testing.assert_close(got.double() / scale, want / scale, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_rows_gradient_does_not_depend_on_other_rows(dtype):
    rows, hidden, inner = 65, 160, 96
    weights, ids = ops.route(randn(rows, EXPERTS), CHOSEN, True)
    first, second = randn(EXPERTS, 2 * inner, hidden, seed=1) * 0.1, randn(EXPERTS, hidden, inner) * 0.1
    given = [t.to(dtype) for t in (randn(rows, hidden, seed=2), randn(rows, hidden))] + [weights, ids]
    of = [first.to(dtype), second.to(dtype), "silu", True, False]
    whole = experts.experts_backward(*given, *of)
    for size in (1, 7):
        parts = [experts.experts_backward(*(t[at : at + size] for t in given), *of) for at in range(0, rows, size)]
        for place in range(2):
            assert not bits.differing(torch.cat([part[place] for part in parts]), whole[place])


def test_the_compiler_sees_one_node():
    logits = randn(ROWS, EXPERTS).requires_grad_()
    torch.library.opcheck(torch.ops.bi_training.route.default, (logits, CHOSEN, True))


def test_without_vllms_kernel(monkeypatch):
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace())  # another test may have loaded vLLM's kernels
    weights, ids = ops.route(randn(ROWS, EXPERTS), CHOSEN, True)
    with pytest.raises(MissingDependency, match="training.experts"):
        ops.experts(
            randn(ROWS, HIDDEN), weights, ids, randn(EXPERTS, 2 * INNER, HIDDEN), randn(EXPERTS, HIDDEN, INNER), "silu"
        )


def test_tiles_are_asked_for_before_an_operator_takes_them(cache, monkeypatch):
    asked, granted = [], True
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(1) or granted)
    monkeypatch.setattr(torch.ops._C, "cpu_fused_moe", None, raising=False)
    machine.allow_tiles.cache_clear()
    try:
        devices.prepare("cpu")
        assert asked == [1]
        granted = False
        machine.allow_tiles.cache_clear()
        weights, ids = ops.route(randn(ROWS, EXPERTS), CHOSEN, True)
        given = randn(ROWS, HIDDEN), weights, ids, randn(EXPERTS, 2 * INNER, HIDDEN), randn(EXPERTS, HIDDEN, INNER)
        with pytest.raises(UnsupportedDevice, match="AMX"):
            experts.experts(given[0].bfloat16(), *given[1:], "silu")
    finally:
        machine.allow_tiles.cache_clear()
