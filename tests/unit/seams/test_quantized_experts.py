"""The seams of experts in FP8 blocks on CUDA: the operands' form, the tiles, and what is refused by name."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cuda import moe

envs = SimpleNamespace()  # a global of the function that is replaced


def layer(name="TritonExperts", block=(128, 128), bias=None):
    experts = type(name, (), {"block_shape": None if block is None else list(block)})()
    weight = torch.zeros(2, 256, 128).to(torch.float8_e4m3fn)
    method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=experts))
    return SimpleNamespace(quant_method=method, w13_weight=weight, w13_bias=bias)


def test_blocks_of_the_triton_kernel_are_covered():
    assert moe._group(layer()) == 128


@pytest.mark.parametrize(
    "held",
    [
        layer("DeepGemmExperts"),
        layer(block=(64, 128)),
        layer(block=None),
        layer(bias=torch.zeros(1)),
        SimpleNamespace(w13_weight=torch.zeros(1, dtype=torch.int32)),
    ],
)
def test_other_experts_are_refused_by_name(held):
    with pytest.raises(UnsupportedFeature, match="moe.cuda_quantized: .* experts of"):
        moe._group(held)


def test_the_number_of_rows_does_not_decide_the_form():
    swapped = moe._swapped(lambda m, n: m < 64 <= n)  # as vLLM decides on Hopper
    assert [swapped(m, 128) for m in (16, 64, 128)] == [True] * 3
    assert [swapped(m, 32) for m in (16, 64)] == [False] * 2


def test_the_default_tile_of_groups_follows_its_certificate(monkeypatch):
    pytest.importorskip("vllm")
    from bi_patch.ops.cuda import moe as certified

    monkeypatch.setattr(certified, "_passed", {})

    def get_default_config(M, E, N, K, topk, dtype, block_shape=None):
        return {"BLOCK_SIZE_M": 16 if M < 9 else 64, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 64, "SPLIT_K": 4}

    close = moe._default(get_default_config)
    given = 4, 384, 256, 2, certified.FP8, [128, 128]
    assert close(1, *given) == certified.FIXED_GROUPS
    certified._passed[4, 384, certified.FP8] = True
    assert close(1, *given) == {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "SPLIT_K": 1}
