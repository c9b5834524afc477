"""On a GPU: forms of SwiGLU have the bits of the kernels of PyTorch and vLLM."""

import pytest
import torch

from bi_patch.ops.cuda import activation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
FACTOR = 0.8838834764831844
FORMS = activation.SILU, activation.PAIRS
UPS = 1.0, -1.3, 0.0078, 3e4, 6e-8, 0.0, -0.0, float("inf"), None


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def dtype(request, tmp_path):
    pytest.importorskip("vllm._custom_ops")
    activation.define_op()
    activation._certified.clear()
    with torch.inference_mode():
        assert all(activation.certify(form, request.param, "vllm", tmp_path).passed for form in FORMS)
        yield request.param


def vllms(x, factor):
    scaled = x.clone()
    if factor != 1:
        scaled[:, : x.shape[1] // 2] *= factor
    return activation._vllms(activation.SILU, scaled)


def same(got, want):
    nan = want.isnan()
    return torch.equal(got.isnan(), nan) and torch.equal(got[~nan].view(torch.int16), want[~nan].view(torch.int16))


@pytest.mark.parametrize("factor", [1.0, FACTOR])
def test_every_gate(dtype, factor):
    gates = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(8, 8192).cuda()
    torch.manual_seed(5)
    for up in UPS:
        ups = torch.full_like(gates, up) if up is not None else (torch.randn(8, 8192, device="cuda") * 3).to(dtype)
        x = torch.cat([gates, ups], 1)
        got = activation.scaled_silu_and_mul(x, factor)
        assert same(got, vllms(x, factor))
        assert same(activation.scaled_silu_and_mul(x[3:4], factor), got[3:4])


@pytest.mark.parametrize("columns", [8, 768, 2056, 3072, 12288, 14336])  # 2056: no whole number of blocks
def test_every_size(dtype, columns):
    torch.manual_seed(5)
    x = (torch.randn(8192, 2 * columns, device="cuda") * 3).to(dtype)
    for rows in (1, 2, 3, 7, 8, 9, 63, 64, 65, 256, 1000, 2048, 8192):
        assert same(activation.scaled_silu_and_mul(x[:rows]), vllms(x[:rows], 1))
    odd = x.flatten()[4 : 4 + 2 * columns].view(1, -1)  # not aligned to 16 bytes
    assert same(activation.scaled_silu_and_mul(odd), vllms(odd, 1))


@pytest.mark.parametrize("columns", [8, 2056, 2880])
def test_pairs(dtype, columns):
    torch.manual_seed(5)
    x = (torch.randn(3000, 2 * columns, device="cuda") * 5).to(dtype)
    for rows in (1, 2, 7, 64, 65, 3000):
        out = torch.empty(rows, columns, dtype=dtype, device="cuda")
        assert activation.swigluoai_and_mul(out, x[:rows])
        assert same(out, activation._vllms(activation.PAIRS, x[:rows]))
