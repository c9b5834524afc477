"""Random weights are seeded, have a useful spread, and are tied on request."""

import pytest

from bi_patch.tools.verify import weights

torch = pytest.importorskip("torch")


def small():
    model = torch.nn.ModuleDict(
        {
            "norm": torch.nn.RMSNorm(64),
            "proj": torch.nn.Linear(64, 32),
            "lm_head": torch.nn.Linear(64, 50, bias=False),
        }
    )
    return model.to(torch.bfloat16)


def test_filled_weights_follow_the_seed_and_keep_the_scale():
    one, two, other = small(), small(), small()
    weights.fill(one, 7)
    weights.fill(two, 7)
    weights.fill(other, 8)
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c), name
    assert abs(one["proj"].weight.std().item() * 8 - 1) < 0.1  # fan_in 64: spread 1 / 8
    assert abs(one["norm"].weight.mean().item() - 1) < 0.1


def test_rates_of_decay_of_mamba_1_are_negative():
    model = torch.nn.ModuleDict({"mixer": torch.nn.Module()})
    model["mixer"].A = torch.nn.Parameter(torch.empty(32, 16))
    weights.fill(model, 7)
    rates = model["mixer"].A
    assert rates.max() <= 0 and rates.std() > 0.5


def test_tied_rows_are_bitwise_equal_in_scored_matrices_only():
    model = small()
    weights.fill(model, 7)
    kept = model["proj"].weight.clone()
    weights.tie(model)
    head = model["lm_head"].weight
    assert torch.equal(head[0::2], head[1::2]) and not torch.equal(head[0], head[2])
    assert torch.equal(model["proj"].weight, kept)


def test_no_axis_of_size_is_tied_by_name_alone():
    assert weights._is_scored("model.layers.0.mlp.gate.weight") and not weights._is_scored("mlp.gate_proj.weight")
