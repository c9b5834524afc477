"""Made weights: packed integers get random bits, and scales that give the weights a spread."""

import pytest
import torch

from bi_patch.tools.verify import weights


class Layer(torch.nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        self.input_size_per_partition = 256
        for name, value in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))


def int8():
    return Layer(weight=torch.zeros(64, 256, dtype=torch.int8), weight_scale=torch.zeros(64, 1))


def gptq():
    packed = {"qweight": torch.zeros(32, 64, dtype=torch.int32), "qzeros": torch.zeros(2, 8, dtype=torch.int32)}
    return Layer(**packed, scales=torch.zeros(2, 64).bfloat16(), g_idx=torch.arange(256, dtype=torch.int32))


@pytest.mark.parametrize("make", [int8, gptq])
def test_integers_and_scales_are_made_from_the_seed(make):
    made = [torch.nn.Sequential(make()) for _ in range(3)]
    for model, seed in zip(made, (7, 7, 8)):
        weights.fill(model, seed)
    first, again, other = (dict(model[0].named_parameters()) for model in made)
    assert all(torch.equal(first[name], again[name]) for name in first)
    packed, scale = ("weight", "weight_scale") if make is int8 else ("qweight", "scales")
    assert not torch.equal(first[packed], other[packed]) and first[packed].unique().numel() > 200
    assert (first[scale] > 0).all() and first[scale].std() > 0
    if make is int8:
        spread = (first["weight"].float() * first["weight_scale"]).std()
        assert 0.05 < spread < 0.08 and first["weight"].min() == -127
    else:
        assert torch.equal(first["g_idx"], torch.arange(256))


def test_an_fp8_kv_cache_gets_a_scale_for_a_layer_or_one_for_each_key_head():
    model = torch.nn.Sequential(*(Layer(k_scale=torch.ones(size), v_scale=torch.ones(size)) for size in (1, 8)))
    weights.fill(model, 7)
    one, each = model
    assert one.k_scale == one.v_scale == torch.tensor(0.02)
    made = torch.cat([each.k_scale, each.v_scale])
    assert made.unique().numel() == 16 and (made >= 0.01).all() and (made <= 0.03).all()


@pytest.mark.parametrize(
    ("packed", "whole", "of_rows", "sign"),
    [
        ("weight_packed", "weight_global_scale", "input_global_scale", -1),
        ("weight", "weight_scale_2", "input_scale", 1),
        ("weight", "weight_scale_2", "input_scale_2", 1),
    ],
)
def test_nvfp4_weights_have_the_spread_of_other_matrices(packed, whole, of_rows, sign):
    """In the names of compressed-tensors, ModelOpt and Quark. The scale of all fits values of activations up to 8."""
    scale = torch.zeros(64, 16, dtype=torch.float8_e4m3fn)
    held = {packed: torch.zeros(64, 128, dtype=torch.uint8), "weight_scale": scale}
    (layer,) = model = torch.nn.Sequential(Layer(**held, **{whole: torch.zeros(2), of_rows: torch.zeros(2)}))
    weights.fill(model, 7)
    codes = getattr(layer, packed)
    q = torch.stack((codes & 15, codes >> 4), -1).view(64, 256).long()
    value = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[q & 7] * torch.where(q > 7, -1, 1)
    made = value * layer.weight_scale.float().repeat_interleave(16, 1) * getattr(layer, whole)[0] ** sign
    assert 0.05 < made.std() < 0.08 and getattr(layer, whole).unique().numel() == 1
    assert (getattr(layer, of_rows) ** sign * 6 * 448).tolist() == pytest.approx([8, 8])


class LinearBase(Layer):
    """Named as vLLM's class, whose layers ranks cut."""


class ReplicatedLinear(LinearBase):
    """Named as vLLM's class, which every rank holds whole."""


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Layer(w13_weight=torch.zeros(4, 8, 16), e_score_correction_bias=torch.zeros(4))


def test_ranks_differ_in_what_they_cut_alone():
    made = []
    for rank in (0, 1, None, None):
        linear = {"weight": torch.zeros(8, 16)}
        alone = LinearBase(weight=torch.zeros(8, 16))
        alone.tp_size = 1
        layers = (
            LinearBase(**linear),
            ReplicatedLinear(weight=torch.zeros(8, 16)),
            alone,
            Experts(),
            torch.nn.Linear(4, 4),
        )
        model = torch.nn.Sequential(*layers)
        weights.fill(model, 7, rank)
        made.append(dict(model.named_parameters()))
    one, other, single, again = made
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    assert differing == {"0.weight", "3.experts.w13_weight"}
    assert all(torch.equal(single[name], again[name]) for name in single)
    assert len({tuple(parameter.flatten()[:3].tolist()) for parameter in one.values()}) == len(one)


def test_k_of_packed_experts_in_each_layout():
    """Words of 8 integers, K first (GPTQ) or last (compressed-tensors), and bytes of two (moe_wna16)."""
    for name, shape, dtype in (
        ("w13_qweight", (4, 32, 64), torch.int32),
        ("w13_weight_packed", (4, 64, 32), torch.int32),
        ("w13_qweight", (4, 64, 128), torch.uint8),
    ):
        named = {f"layers.0.{name}": torch.zeros(shape, dtype=dtype)}
        assert weights._packed_size(named, "layers.0.w13_scales") == 256
