"""On a GPU with vLLM: attention and patches of an encoder give an image the same bits alone and in company."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.mark.parametrize("size", [64, 72, 80, 128])
@pytest.mark.parametrize("heads", [2, 16])
def test_attention_in_company(heads, size):
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    from bi_patch.ops.cuda import image_attention
    from bi_patch.seams.cuda import vision

    version = get_flash_attn_version(head_size=size)
    attend = vision._attention(lambda: None)

    def run(q, k, v, ends, longest):
        return attend(q, k, v, 1, False, version, size**-0.5, ends, longest)

    assert image_attention.differs(run, heads, size, torch.bfloat16) == ""


def test_patches_in_company():
    from vllm.model_executor.layers.conv import Conv2dLayer

    from bi_patch.ops.cuda import aten
    from bi_patch.seams.cuda import vision

    aten.override()
    layer = object.__new__(Conv2dLayer)
    torch.nn.Module.__init__(layer)
    layer.kernel_size, layer.enable_linear, layer.input_size, layer.out_channels = (14, 14), True, 3 * 14 * 14, 64
    layer.weight = torch.nn.Parameter(torch.randn(64, 3, 14, 14, device="cuda", dtype=torch.bfloat16) / 24)
    layer.bias = torch.nn.Parameter(torch.randn(64, device="cuda", dtype=torch.bfloat16))
    forward = vision._patches(Conv2dLayer.forward_cuda)
    images = torch.randn(5, 3, 56, 42, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        found = forward(layer, images)
        plain = torch.nn.functional.conv2d(images.float(), layer.weight.float(), layer.bias.float(), stride=14)
        torch.testing.assert_close(found.float(), plain, rtol=2e-2, atol=2e-2)
        for i in range(5):
            assert torch.equal(forward(layer, images[i : i + 1])[0], found[i])
