"""Faults in code that only the CPU engine runs: the CPU router, and INT8 linears."""

from __future__ import annotations

import contextlib

import torch

from bi_patch.tools.faults import parts
from bi_patch.tools.faults.base import CPU, FEW, Fault
from bi_patch.tools.models import recipes
from bi_patch.tools.verify import layers
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.runner import replaced


def unsorted_topk(engine: LocalEngine):
    """The router's top-k breaks no ties: it lists experts by index for more than four rows, otherwise by value."""
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    from bi_patch.seams.overlay import Overlay, with_globals

    def topk(scores, k, dim=-1, **kwargs):
        if scores.shape[0] <= FEW:
            return torch.topk(scores, k, dim=dim, sorted=True)
        ids = parts.higher_first(scores, k).indices.sort(-1).values
        return scores.gather(-1, ids), ids

    function = with_globals(parts.original("moe.cpu_routing"), torch=Overlay(torch, topk=topk))
    return replaced(cpu_router, "_softmax_topk", lambda _: function)


def scalar_tail(engine: LocalEngine):
    """Rows past the last four full rows get their experts' weights from scalar code, which rounds in other places."""
    from bi_patch.ops.cpu import moe

    def make(held):
        def softmax_topk(logits, top_k, renormalize):
            weights, ids = held(logits, top_k, renormalize)
            tail = logits.shape[0] // FEW * FEW
            wide = logits[tail:].double()
            scores = wide.gather(-1, ids[tail:].long())
            total = (scores if renormalize else wide).logsumexp(-1, keepdim=True)
            weights[tail:] = (scores - total).exp().float()
            return weights, ids

        return softmax_topk

    return replaced(moe, "softmax_topk", make)


@contextlib.contextmanager
def imprecise_cosines(engine: LocalEngine):
    """The first half of the rotary tables' cosines has the precision of MKL's kernel for a quick answer, about 12 bits.

    So it is in a process where two threads make MKL's first call of this function at once.
    """
    rotations = [m for m in layers.model(engine).modules() if hasattr(m, "cos_sin_cache")]
    held = {table: table.clone() for table in {m.cos_sin_cache for m in rotations}}  # layers share a table
    try:
        for table in held:
            cosines = table[: table.shape[0] // 2, : table.shape[1] // 2]
            cosines.copy_((cosines.float() * 2**12 + 0.5).floor() / 2**12)
        yield
    finally:
        for table, before in held.items():
            table.copy_(before)


@contextlib.contextmanager
def shared_int8_scale(engine: LocalEngine):
    """Quantized linears round their inputs to INT8 with one scale for all rows of the batch."""
    with contextlib.ExitStack() as stack:
        for _, layer, _ in list(layers.quantized(engine)):

            def wrap(held):
                def apply(given, x, bias=None):
                    scale = x.float().abs().amax().clamp_min(1e-12) / 127
                    return held(given, ((x.float() / scale).round() * scale).to(x.dtype), bias)

                return apply

            stack.enter_context(replaced(layer.quant_method, "apply", wrap))
        yield


FAULTS = (
    Fault(
        "shared INT8 scale",
        11,
        shared_int8_scale.__doc__,
        "co-batch contents",
        shared_int8_scale,
        (CPU,),
        "qkv_proj",
        seam={"cpu": "quantized.cpu_int8"},
        model=recipes.INT8,
    ),
    Fault(
        "unsorted top-k of experts",
        13,
        unsorted_topk.__doc__,
        "tied logits and routers",
        unsorted_topk,
        (CPU,),
        "mlp.experts",
        "topk",
        seam={"cpu": "moe.cpu_router"},
    ),
    Fault(
        "scalar code for the last rows",
        26,
        scalar_tail.__doc__,
        "batch size",
        scalar_tail,
        (CPU,),
        "mlp.experts",
        seam={"cpu": "moe.cpu_routing"},
        emulated=(CPU,),
    ),
    Fault(
        "imprecise cosines",
        37,
        imprecise_cosines.__doc__,
        "restart",
        imprecise_cosines,
        (CPU,),
        "rotary_emb",
        seam={"cpu": "rotary.cpu_forward"},
        emulated=(CPU,),
    ),
)
