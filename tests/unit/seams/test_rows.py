"""Keys of row certificates on CUDA: routers that run different code have different certificates."""

import functools
from types import SimpleNamespace

import torch

from bi_patch.seams.cuda import rows
from bi_patch.seams.naming import dotted


class Router:
    def __init__(self, **given):
        self.__dict__.update(given)

    def select_experts(self, x, logits):
        return x, logits


def problem(**given):
    layer = SimpleNamespace(
        router=Router(**given), moe_config=SimpleNamespace(num_experts=8, hidden_dim=4, experts_per_token=2)
    )
    (check,) = rows._router(layer, torch.bfloat16)
    return check.problem


def choose(hidden, logits):
    """A model's own choice of experts."""


def test_what_decides_a_routers_kernel_is_in_its_key():
    ways = [
        {"scoring_func": "softmax", "renormalize": True},
        {"scoring_func": "softmax", "renormalize": False},
        {"scoring_func": "sigmoid", "renormalize": True},
        {"scoring_func": "sigmoid", "renormalize": True, "_e_score_correction_bias": torch.zeros(8)},
        {"scoring_func": "sigmoid", "num_expert_group": 4, "topk_group": 2},
        {"scoring_func": "sigmoid", "num_expert_group": 2, "topk_group": 2},
        {"custom_routing_function": functools.partial(choose, 1)},
        {"custom_routing_function": problem},
    ]
    found = [problem(**way) for way in ways]
    assert len(set(found)) == len(ways)
    assert "custom_routing_function=" in found[-2] and ".choose " in found[-2]


def test_names_of_code():
    assert dotted(functools.partial(functools.partial(choose, 1), 2)) == dotted(choose)
    assert dotted(Router()).endswith(".Router")
