"""Row certificates on CUDA: which operations get one, and keys that differ where a router's code differs."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bi_patch.errors import UnsupportedFeature
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


def test_a_router_with_zero_experts_gets_a_logit_for_each_and_its_own_output_is_compared():
    router = Router(e_score_correction_bias=torch.zeros(12), zero_expert_output="what zero experts hand on")
    layer = SimpleNamespace(router=router, moe_config=SimpleNamespace(num_experts=8, hidden_dim=4, experts_per_token=2))
    (check,) = rows._router(layer, torch.bfloat16)
    assert "E=12" in check.problem
    assert check.run("rows", "logits") == ("rows", "logits", "what zero experts hand on")
    (plain,) = rows._router(SimpleNamespace(router=Router(), moe_config=layer.moe_config), torch.bfloat16)
    assert "E=8" in plain.problem and plain.run("rows", "logits") == ("rows", "logits")


def test_names_of_code():
    assert dotted(functools.partial(functools.partial(choose, 1), 2)) == dotted(choose)
    assert dotted(Router()).endswith(".Router")


class LayerNorm(nn.LayerNorm):
    pass


class Unsized(nn.Module):
    pass


Unsized.__name__ = "RMSNorm"


class TwoRotaryEmbedding(nn.Module):
    head_size, rotary_dim = 8, 4

    def __init__(self, vision=False):
        super().__init__()
        self.cos_sin_cache = torch.zeros(32, 4)
        if vision:
            self.forward_native = lambda query, key: None

    def forward(self, positions, query, key):
        return query, key


def checked(module):
    return [(check.operation, check.problem) for check in rows._of_layers(module, torch.bfloat16)]


@pytest.fixture
def on_device(monkeypatch):
    """Weights look as if they were on a GPU."""
    monkeypatch.setattr(nn.Parameter, "is_cuda", True)


def test_norms_without_weight_and_of_several_dimensions(on_device):
    name = "LayerNorm"
    assert checked(LayerNorm(6)) == [("cuda.norm", f"{name} 6 bfloat16")]
    assert checked(LayerNorm(6, bias=False)) == [("cuda.norm", f"{name} 6 without bias bfloat16")]
    plain = LayerNorm((4, 6), elementwise_affine=False)
    assert checked(plain) == [("cuda.norm", f"{name} 4 6 without weight without bias bfloat16")]
    (check,) = rows._norm(plain, torch.float32)
    x = torch.randn(3, 4, 6)
    assert torch.equal(check.run(x)[0], plain(x))
    with pytest.raises(UnsupportedFeature, match=r"RMSNorm|Unsized"):
        checked(Unsized())


def test_activations_of_plain_and_gated_layers():
    plain = nn.Sequential(nn.Linear(4, 16), nn.GELU(approximate="tanh"), nn.Linear(16, 4))
    assert checked(plain) == [("cuda.activation", "GELU 16 bfloat16 forward")]
    gated = nn.ModuleDict({"down_proj": nn.Linear(8, 4), "gate_up_proj": nn.Linear(4, 16), "act_fn": nn.Identity()})
    assert checked(gated) == [("cuda.activation", "Identity 16 bfloat16 forward")]
    assert checked(nn.Sequential(nn.ReLU(), nn.Softmax(-1))) == [("cuda.activation", "ReLU 4096 bfloat16 forward")]


def test_rotations_of_layers_with_and_without_sizes():
    def layer(**sizes):
        held = nn.Module()
        held.turning = TwoRotaryEmbedding()
        held.__dict__.update(sizes)
        return checked(held)

    def rotation(q, k):
        return [("cuda.rotary", f"TwoRotaryEmbedding {q} {k} head_size=8 rotary_dim=4 bfloat16")]

    assert layer(q_size=32, kv_size=16) == rotation(32, 16)
    assert layer(attn=SimpleNamespace(num_heads=6, num_kv_heads=2, head_size=8)) == rotation(48, 16)
    assert layer() == rotation(16, 8)
    seeing = nn.Module()
    seeing.rotary_emb = TwoRotaryEmbedding(vision=True)  # of a vision tower: it takes no positions
    assert checked(seeing) == []


def test_rotations_by_sections_have_a_check_of_their_own():
    layer = nn.Module()
    layer.q_size, layer.kv_size = 32, 16
    layer.rotary_emb = TwoRotaryEmbedding()
    layer.rotary_emb.mrope_section, layer.rotary_emb.mrope_interleaved = [1, 1, 0], True
    found = [problem for _, problem in checked(layer)]
    assert found[1:] == ["TwoRotaryEmbedding 32 16 bfloat16 head_size=8 sections=[1, 1, 0] interleaved=True"]
    check = list(rows._rotation(layer, torch.bfloat16))[1]
    layer.rotary_emb.forward = lambda positions, q, k: (q + positions[0, :, None], k + positions[2, :, None])
    x = torch.randn(3, 48)
    q, k = check.run(torch.arange(9).view(3, 3), x)
    assert torch.equal(q, x[:, :32] + torch.tensor([[0], [3], [6]]))
    assert torch.equal(k, x[:, 32:] + torch.tensor([[2], [5], [8]]))
