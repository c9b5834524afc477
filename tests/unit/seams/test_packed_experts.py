"""Experts of 4 bits on vLLM's kernels: which are certified, how they are called, their random weights, their tile."""

import math
from types import SimpleNamespace

import pytest
import torch

from bi_patch.seams.cuda import moe, packed_experts, quantized
from bi_patch.tools.verify import weights

envs = SimpleNamespace()  # a global of the function that is replaced
E, N, K, TOP = 4, 64, 128, 2


class TritonWNA16Experts:
    quant_config = SimpleNamespace(w1_zp=None)


class MarlinExperts(TritonWNA16Experts):
    pass


class Method:
    def __init__(self, kind):
        self.moe_kernel = SimpleNamespace(fused_experts=kind())

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
        assert shared_experts is None and shared_experts_input is None and layer.quant_method is self
        return x * topk_weights.sum(1, keepdim=True).to(x.dtype)


def layer(kind=TritonWNA16Experts):
    made = torch.nn.Module()
    made.quant_method = Method(kind)
    made.moe_config = SimpleNamespace(
        num_experts=E, hidden_dim=K, experts_per_token=TOP, activation=SimpleNamespace(value="silu")
    )
    for name, size in (("w13", (E, 2 * N, K // 2)), ("w2", (E, K, N // 2))):
        held = torch.zeros(size, dtype=torch.uint8)
        setattr(made, f"{name}_weight", torch.nn.Parameter(held, requires_grad=False))
    return made


def model(*layers):
    made = torch.nn.Module()
    for number, each in enumerate(layers):
        made.add_module(str(number), each)
    return made


def test_each_kind_of_packed_experts_gets_a_row_check(monkeypatch):
    import vllm.config
    import vllm.forward_context

    entered = []

    class Context:
        def __init__(self, *given):
            entered.append(given)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(vllm.forward_context, "set_forward_context", Context)
    monkeypatch.setattr(vllm.config, "get_current_vllm_config", lambda: "config")
    (check,) = packed_experts.checks(model(layer(), layer(MarlinExperts), torch.nn.Linear(2, 2)), torch.bfloat16)
    assert check.operation == "cuda.packed_experts" and check.indexes and check.rows[-1] > 1024
    words = f"TritonWNA16Experts Method E={E} K={K} top{TOP} silu w13_weight ({E}, {2 * N}, {K // 2}) uint8"
    assert check.problem.startswith(words) and check.problem.endswith("bfloat16")
    x, scores, ids = check.make(5, torch.Generator().manual_seed(1))
    assert x.shape == (5, K) and scores.shape == ids.shape == (5, TOP) and ids.dtype == torch.int32
    assert all(len(set(row)) == TOP for row in ids.tolist())  # a token's experts are distinct
    (out,) = check.run(x, scores, ids)
    assert out.shape == x.shape and entered == [(None, "config")]


def test_other_kernels_of_packed_experts_are_refused_by_name():
    from bi_patch.errors import UnsupportedFeature

    assert packed_experts.covers(layer()) and not packed_experts.covers(layer(MarlinExperts))
    with pytest.raises(UnsupportedFeature, match="moe.cuda_quantized: .* experts of MarlinExperts with torch.uint8"):
        moe._scales(layer(MarlinExperts))


def test_new_weights_of_packed_experts_are_refused():
    from bi_patch.errors import UnsupportedFeature

    held = layer()
    held.w13_weight = torch.nn.Parameter(torch.zeros((1, 1, 1), dtype=torch.int32), requires_grad=False)
    with pytest.raises(UnsupportedFeature, match="linear.cuda_update"):
        quantized.refuse_update(model(held))


def test_the_tile_of_packed_experts_is_one_for_all_rows(monkeypatch):
    from bi_patch.ops.cuda import moe as certified

    monkeypatch.setattr(certified, "_passed", {})
    asked = []

    def get_default_config(*given):
        asked.append(given)
        return dict(certified.FIXED)

    close = moe._default(get_default_config)
    tiles = [close(m, E, 2 * N, K, TOP, "int4_w4a16", [0, 32]) for m in (1, 20, 300, 4096)]
    assert tiles == [certified.FIXED] * 4 and len(asked) == 4


def test_random_weights_of_packed_experts_have_the_spread_of_others():
    made = torch.nn.Module()
    experts = torch.nn.Module()
    made.add_module("experts", experts)

    def add(name, value):
        experts.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))

    add("w13_weight_packed", torch.zeros((E, 2 * N, K // 8), dtype=torch.int32))
    add("w13_weight_scale", torch.zeros(E, 2 * N, K // 32))
    add("w2_weight", torch.zeros((E, K, N // 2), dtype=torch.uint8))
    add("w2_weight_scale", torch.zeros((E, K, N // 32), dtype=torch.uint8))
    weights.fill(made, 7)
    words = experts.w13_weight_packed[..., None] >> torch.arange(0, 32, 4) & 15
    first = (words.flatten(2) - 8) * experts.w13_weight_scale.repeat_interleave(32, 2)
    assert 0.7 < first.std() * math.sqrt(K) < 1.4
    code = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = experts.w2_weight[..., None].int() >> torch.tensor([0, 4]) & 15
    value = code[nibbles.flatten(2) & 7] * torch.where(nibbles.flatten(2) > 7, -1, 1)
    second = value * 2.0 ** (experts.w2_weight_scale.int() - 127).repeat_interleave(32, 2)
    assert 0.5 < second.std() * math.sqrt(N) < 2
