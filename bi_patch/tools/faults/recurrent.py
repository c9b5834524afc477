"""Faults in layers with a recurrent state, planted in an engine with gated delta nets."""

from __future__ import annotations

import torch

from bi_patch.tools.faults import parts
from bi_patch.tools.faults.base import BOTH, CPU, CUDA, Fault, platform
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.runner import replaced

MODEL = "Qwen3-Next"
_SEAM = {"cpu": "recurrent.cpu_gated_delta_net", "cuda": "recurrent.cuda_gated_delta_net"}


def chunks_from_the_cut(engine: LocalEngine):
    """vLLM's own kernels: chunks start where the scheduler cut the prompt, and other kernels decode."""
    return _stock_on_cpu() if platform() == "cpu" else _stock_on_cuda()


def _stock_on_cpu():
    from vllm import _custom_ops
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    stock, packs = parts.original(_SEAM["cpu"]), torch.cpu._is_avx512_bf16_supported()

    def run(layer, *given):
        held = layer.conv1d.weight.data
        if packs:  # as vLLM keeps it on such a machine
            layer.conv1d.weight.data = _custom_ops.causal_conv1d_weight_pack(held.view(held.shape[0], -1).contiguous())
        try:
            return stock(layer, *given)
        finally:
            layer.conv1d.weight.data = held

    return replaced(gdn_attention, "_cpu_gdn_attention_nonspec", lambda held: run)


def _stock_on_cuda():
    from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention

    stock = parts.original(_SEAM["cuda"])
    return replaced(QwenGatedDeltaNetAttention, "_forward_core", lambda held: stock)


def rounded_states(engine: LocalEngine):
    """The state is saved, rounded to bf16, where a step ends, which is in the middle of a chunk."""
    if platform() == "cpu":
        from bi_patch.ops.cpu import recurrent

        name, states_at, spans_at = "gated_delta_rule", 6, 7
    else:
        from bi_patch.ops.cuda import recurrent

        name, states_at, spans_at = "run", 11, 12

    def make(held):
        def run(*given):
            held(*given)
            states, slots = given[states_at], given[spans_at].slots.long()
            states[slots] = states[slots].bfloat16().float()

        return run

    return replaced(recurrent, name, make)


def pieces_by_batch(engine: LocalEngine):
    """The number of requests decides how a state enters products, as an autotuned kernel would."""
    from bi_patch.kernels.cuda import recurrent

    def make(held):
        return lambda form, requests: held(form, requests)._replace(pieces=2 if requests == 1 else 1)

    return replaced(recurrent, "choose", make)


def _fault(name, plant, axis="chunk budget", platforms=BOTH, emulated=()) -> Fault:
    return Fault(
        name,
        24,
        plant.__doc__,
        axis,
        plant,
        platforms,
        "linear_attn",
        "gdn",
        seam=_SEAM,
        emulated=emulated,
        model=MODEL,
    )


FAULTS = (
    _fault("chunks from the scheduler's cut", chunks_from_the_cut),
    _fault("states saved between chunk boundaries", rounded_states, emulated=BOTH),
    _fault("tile of a recurrence by the batch", pieces_by_batch, "batch size", (CUDA,), emulated=(CUDA,)),
)
ON_CPU = tuple(fault for fault in FAULTS if CPU in fault.platforms)
