"""On a GPU: SwiGLU with a factor of its gate has the bits of the two kernels that it stands for."""

import pytest
import torch

from bi_patch.kernels.cuda import gated

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
FACTOR = 0.8838834764831844


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_of_a_product_and_vllms_activation(dtype):
    pytest.importorskip("vllm._custom_ops")
    gates = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(8, 8192).cuda()  # every number
    torch.manual_seed(5)
    x = torch.cat([gates, (torch.randn(8, 8192, device="cuda") * 3).to(dtype)], 1)
    scaled, want = x.clone(), torch.empty(8, 8192, dtype=dtype, device="cuda")
    scaled[:, :8192] *= FACTOR
    torch.ops._C.silu_and_mul(want, scaled)
    got, nan = gated.run(x, FACTOR), want.isnan()
    assert torch.equal(got.isnan(), nan) and torch.equal(got[~nan].view(torch.int16), want[~nan].view(torch.int16))
    assert torch.equal(gated.run(x[3:4], FACTOR)[~nan[3:4]], got[3:4][~nan[3:4]])
