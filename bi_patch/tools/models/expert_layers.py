"""A layer of experts on one GPU as vLLM builds it, without a model around. For tests and benchmarks of kernels."""

from __future__ import annotations

from typing import Any

import torch


def config(experts: int, top: int, hidden: int, inner: int, activation: str, **more: Any) -> Any:
    """vLLM's FusedMoEConfig of bf16 activations. top: experts of a token. activation: the name of a MoEActivation.
    more: other fields."""
    from vllm.model_executor.layers.fused_moe import config as configs
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    return configs.FusedMoEConfig(
        num_experts=experts,
        experts_per_token=top,
        hidden_dim=hidden,
        intermediate_size=inner,
        num_local_experts=experts,
        num_logical_experts=experts,
        activation=MoEActivation[activation],
        device="cuda",
        routing_method=configs.RoutingMethodType.Renormalize,
        moe_parallel_config=configs.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        **more,
    )


def layer(method: Any, moe: Any, hidden: int, inner: int, **more: Any) -> torch.nn.Module:
    """A layer with the parameters of vLLM's method, whose values nobody has set. moe: of `config`. hidden, inner: the
    sizes that the method stores, which may be padded. more: other attributes of the layer."""
    held = torch.nn.Module()
    given = {"activation": moe.activation, "global_num_experts": moe.num_experts, "expert_map": None, "moe_config": moe}
    given |= {"apply_router_weight_on_input": False, "intermediate_size_per_partition": inner, **more}
    for name, value in given.items():
        setattr(held, name, value)
    held.quant_method, held._expert_routing_tables = method, lambda: None
    with torch.device("cuda"):
        method.create_weights(held, moe.num_experts, hidden, inner, torch.bfloat16, weight_loader=None)
    return held


def routed(rows: int, experts: int, top: int, hidden: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Random tokens [rows, hidden] in bf16, the weights [rows, top] in fp32 and the ids [rows, top] int32 of their
    experts."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn((rows, hidden), generator=generator, device="cuda").bfloat16()
    scores = torch.rand((rows, experts), generator=generator, device="cuda")
    weights, ids = scores.softmax(-1).topk(top, -1)
    return x, weights, ids.int()
