"""The seams of experts in FP8 blocks on CUDA: the operands' form, the tiles, and what is refused by name."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops.cuda import machine
from bi_patch.ops.cuda import moe as certified
from bi_patch.seams.cuda import moe

envs = SimpleNamespace()  # a global of the function that is replaced


def layer(name="TritonExperts", block=(128, 128), bias=None, scales=(None, None), token=False, rows=None):
    held = {"block_shape": None if block is None else list(block), "per_act_token_quant": token}
    held |= {"w1_scale": scales[0], "w2_scale": scales[1], "a1_scale": rows, "a2_scale": rows}
    experts = type(name, (), held)()
    w13, w2 = (torch.zeros(size).to(torch.float8_e4m3fn) for size in ((2, 256, 128), (2, 128, 128)))
    method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=experts))
    return SimpleNamespace(quant_method=method, w13_weight=w13, w2_weight=w2, w13_bias=bias)


ROWS = torch.ones(2, 256, 1), torch.ones(2, 128, 1)
EACH = torch.ones(2), torch.ones(2)


def test_blocks_of_the_triton_kernel_are_covered():
    assert moe._scales(layer()) == (128, "")


@pytest.mark.parametrize(
    ("given", "scale"),
    [
        ({"scales": ROWS, "token": True}, certified.ROW),
        ({"scales": EACH, "token": True}, certified.EXPERT_AND_ROW),
        ({"scales": EACH, "rows": torch.ones(1)}, certified.EXPERT),
        ({"scales": EACH, "rows": torch.ones(())}, certified.EXPERT),
    ],
)
def test_scales_of_the_triton_kernel_without_blocks_are_covered(given, scale):
    assert moe._scales(layer(block=None, **given)) == (0, scale)


@pytest.mark.parametrize(
    "held",
    [
        layer("DeepGemmExperts"),
        layer(block=(64, 128)),
        layer(block=None, scales=EACH),  # one scale for the rows of a batch
        layer(block=None, scales=ROWS),
        layer(block=None, scales=ROWS, rows=torch.ones(1)),
        layer(block=None, scales=EACH, rows=torch.ones(2)),
        layer(block=None, scales=(ROWS[0], EACH[1]), token=True),
        layer(block=None, scales=ROWS, token=True, bias=torch.zeros(1)),
        layer("CutlassExpertsFp8", block=None, scales=ROWS, token=True),
        layer(bias=torch.zeros(1)),
        SimpleNamespace(w13_weight=torch.zeros(1, dtype=torch.int32)),
    ],
)
def test_other_experts_are_refused_by_name(held):
    with pytest.raises(UnsupportedFeature, match="moe.cuda_quantized: .* experts of"):
        moe._scales(held)


@pytest.mark.parametrize(
    ("form", "token", "channel", "block", "fixed"),
    [
        ({"group": 128}, False, False, [128, 128], False),
        ({"scale": certified.ROW}, True, True, None, False),
        ({"scale": certified.EXPERT_AND_ROW}, True, False, None, False),
        ({"scale": certified.EXPERT}, False, False, None, True),
    ],
)
def test_the_certificate_calls_the_kernel_with_the_form_of_the_layer(form, token, channel, block, fixed):
    pytest.importorskip("vllm")
    problem = certified.Problem(4, 64, 128, 2, torch.bfloat16, **form)
    calls = []
    run = moe._run(lambda *given, **named: calls.append((given, named)), "silu", problem)
    x, w13, w2 = certified.operands(problem, 3, torch.Generator().manual_seed(1))
    run(x, w13, w2, "weights", "ids")
    ((given, named),) = calls
    held = named["quant_config"]
    assert given[1] is w13[0] and given[2] is w2[0] and held.w1_scale is w13[1] and held.w2_scale is w2[1]
    assert held.use_fp8_w8a8 and held.per_act_token_quant == token and held.per_out_ch_quant == channel
    assert held.block_shape == block and (held.a1_scale is not None) == (held.a2_scale is not None) == fixed


GIVEN = "A", "B", "C", "A_scale", "B_scale", "weights", "rows", "experts", "padded"


@pytest.fixture
def invoke(monkeypatch):
    """The seam of a stand-in for vLLM's launch, which returns the operands' form. Calls of the bundled kernel go into
    invoke.calls."""
    block_experts = pytest.importorskip("bi_patch.kernels.triton.block_experts")
    vllm = {"enable_swap_ab": lambda m, n: m < 64 <= n}  # as vLLM decides on Hopper
    names = "A, B, C, A_scale, B_scale, topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded"
    exec(
        f"def invoke({names}, mul_routed_weight, top_k, config, use_fp8_w8a8, block_shape=None, B_bias=None):\n"
        "    return enable_swap_ab(config['BLOCK_SIZE_M'], config['BLOCK_SIZE_N'])",
        vllm,
    )
    closed, calls = moe._blocks(vllm["invoke"]), []
    monkeypatch.setattr(machine, "is_hopper", lambda: True)
    monkeypatch.setattr(block_experts, "products", lambda *given: calls.append(given))

    def invoke(m, n, block_shape, weighted=True, fp8=True, **named):
        config = {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n}
        return closed(*GIVEN, weighted, 2, config, use_fp8_w8a8=fp8, block_shape=block_shape, **named)

    invoke.calls = calls
    return invoke


def test_blocks_take_the_bundled_kernel(invoke):
    for m, n, swap in ((16, 128, True), (32, 64, True), (64, 128, False), (128, 128, False)):
        for weighted in (True, False):
            invoke(m, n, [128, 128], weighted)
            config = {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n}
            weights = "weights" if weighted else None
            assert invoke.calls.pop() == (*GIVEN[:5], weights, *GIVEN[6:], 2, config, swap)
    with pytest.raises(UnsupportedFeature, match=r"moe\.cuda_blocks: .* bias"):
        invoke(16, 64, [128, 128], B_bias="bias")
    assert not invoke.calls


def test_others_take_the_kernel_of_vllm(invoke, monkeypatch):
    # Without groups, one expression multiplies by the scales in both forms: the tile may decide.
    assert [invoke(m, 128, None) for m in (16, 64, 128)] == [True, False, False]
    assert invoke(16, 64, None, B_bias="bias") and invoke(16, 64, [0, 128], fp8=False)
    monkeypatch.setattr(machine, "is_hopper", lambda: False)
    assert invoke(16, 64, [128, 128])
    assert not invoke.calls


def test_the_default_tile_of_groups_follows_its_certificate(monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setattr(certified, "_passed", {})
    monkeypatch.setattr(machine, "is_hopper", lambda: True)

    def get_default_config(M, E, N, K, topk, dtype, block_shape=None):
        return {"BLOCK_SIZE_M": 16 if M < 9 else 64, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 64, "SPLIT_K": 4}

    close = moe._default(get_default_config)
    given = 4, 384, 256, 2, certified.FP8, [128, 128]
    assert close(1, *given) == certified.FIXED_GROUPS
    assert close(1, *given[:-1], None) == get_default_config(1, *given[:-1])
    certified._passed[4, 384, certified.FP8] = True
    by_row = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "SPLIT_K": 1}
    assert close(1, *given[:-1], None) == by_row
    assert close(1, *given) == {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "SPLIT_K": 1}
    # 64 rows for each of four experts, of which a token takes two.
    assert close(9, *given[:-1], None) == close(127, *given[:-1], None) == certified.FEW
    assert close(128, *given[:-1], None) == certified.MANY
    plain = close(128, 4, 384, 256, 2, None)
    assert plain["BLOCK_SIZE_M"] == 64 and plain["BLOCK_SIZE_N"] < 128
    assert close(9, *given) == close(32, *given) == certified.GROUPS[16]
    assert close(33, *given) == close(256, *given) == certified.GROUPS[128]
    assert close(257, *given) == close(1, *given) | {"BLOCK_SIZE_M": 64}
    monkeypatch.setattr(machine, "is_hopper", lambda: False)
    assert close(128, *given[:-1], None)["BLOCK_SIZE_N"] == close(9, *given)["BLOCK_SIZE_N"] == 64
