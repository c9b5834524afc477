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
