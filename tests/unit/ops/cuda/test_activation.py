"""SwiGLU on CUDA, without a GPU: the bundled kernel serves with its certificate, and vLLM's kernel without."""

import pytest
import torch

from bi_patch.kernels.cuda import gated
from bi_patch.ops import certificates
from bi_patch.ops.cuda import activation, certify, machine

BF16 = torch.bfloat16


def product(x, factor=1.0, adds_zero=False):
    gate, up = x.chunk(2, 1)
    return torch.nn.functional.silu(gate * factor) * (up + 0.0 if adds_zero else up)


def clamped(x, *_):
    gate, up = x.unflatten(1, (-1, 2)).unbind(2)
    return gate.clamp(max=7) * (up + 1)


FORMS = {activation.SILU: product, activation.PAIRS: clamped}


@pytest.fixture(params=[False, True])
def adds_zero(request, monkeypatch):
    """vLLM's kernels, one of which adds 0 to the other half in some releases, and bundled kernels with their calls."""
    calls = []
    for name, value in (("device", "none"), ("libraries", "none"), ("kernels_digest", "1")):
        monkeypatch.setattr(machine, name, lambda *_, held=value: held)
    monkeypatch.setattr(activation, "_certified", {})
    monkeypatch.setattr(activation, "_adds_zero", {})
    monkeypatch.setattr(certificates, "_warned", set())
    monkeypatch.setattr(activation, "_certify", lambda *given, made=activation._certify: made(*given, device="cpu"))
    monkeypatch.setattr(activation, "_vllms", lambda form, x: FORMS[form](x, 1.0, request.param))
    monkeypatch.setattr(gated, "run", lambda *given: calls.append(given[1:]) or product(*given))
    monkeypatch.setattr(gated, "run_pairs", lambda x, out, alpha, limit: out.copy_(clamped(x, alpha, limit)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    request.node.calls = calls
    return request.param


def made(tmp_path, dtype=BF16, form=activation.SILU):
    given = [(form, dtype)] * 2
    return certify.certify([], [], [], [], [], max_rows=1, library="vllm 1", cache=tmp_path, activations=given)


def test_serves_as_vllms_release_treats_minus_zero(adds_zero, tmp_path, request):
    (certificate,) = made(tmp_path)
    assert certificate.passed and certificate.evidence.compared == 8 * 65536
    x = torch.tensor([[1.0, -1.0, -0.0, -0.0]], dtype=BF16)
    assert activation._run(x, 1.0).signbit().tolist() == [[not adds_zero, adds_zero]]
    assert request.node.calls[-1] == (1.0, adds_zero)


def test_vllms_kernel_serves_other_types_and_where_a_gate_differs(adds_zero, tmp_path, monkeypatch, request):
    x = torch.randn(3, 16).to(BF16)
    assert torch.equal(activation._run(x, 0.3), product(x, 0.3)) and not request.node.calls
    assert made(tmp_path, torch.float32) == []
    monkeypatch.setattr(gated, "run", lambda x, *_: product(x) + (x[:, : x.shape[1] // 2] == 3))
    (certificate,) = made(tmp_path)
    assert not certificate.passed and "elements differ" in certificate.evidence.first
    assert torch.equal(activation._run(x, 1.0), product(x))


def test_pairs_are_written_with_a_certificate_alone(adds_zero, tmp_path):
    x, out = torch.randn(3, 16).to(BF16), torch.zeros(3, 8, dtype=BF16)
    assert not activation.swigluoai_and_mul(out, x) and not out.any()
    (certificate,) = made(tmp_path, form=activation.PAIRS)
    assert certificate.passed and activation.swigluoai_and_mul(out, x) and torch.equal(out, clamped(x))
    narrow, strided = torch.zeros(3, 4, dtype=BF16), torch.zeros(3, 16, dtype=BF16)[:, :8]
    assert not activation.swigluoai_and_mul(narrow, x[:, :8]) and not activation.swigluoai_and_mul(strided, x)
