"""Faults in a model's experts, which are the same on every platform."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bi_patch.tools.faults import parts
from bi_patch.tools.faults.base import BOTH, RANKS, Fault
from bi_patch.tools.verify import layers
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.runner import replaced

EXPERTS = {"cpu": "moe.cpu_experts", "cuda": "moe.cuda_tables"}


@contextlib.contextmanager
def each_moe(engine: LocalEngine, make) -> Iterator[None]:
    """Within this context, every layer's experts run make(kernel object, own).

    own: the layer's experts, (x, weights, ids) -> [rows, hidden].
    """
    with contextlib.ExitStack() as stack:
        for _, experts in list(layers.experts(engine)):

            def wrap(held, experts=experts):
                def apply(output, hidden_states, w1, w2, topk_weights, topk_ids, *args, **kwargs):
                    def own(x, weights, ids):
                        out = torch.empty_like(x)
                        held(out, x, w1, w2, weights, ids, *args, **kwargs)
                        return out

                    output.copy_(make(experts, own)(hidden_states, topk_weights, topk_ids))

                return apply

            stack.enter_context(replaced(experts, "apply", wrap))
        yield


def one_expert_at_a_time(own, x, weights, ids, order):
    """Add each expert's product in the rows' dtype, like atomics in memory; fp32 sums would round the order away."""
    total = None
    for j in order:
        part = own(x, weights[:, j : j + 1].contiguous(), ids[:, j : j + 1].contiguous())
        total = part if total is None else total + part
    return total


def experts_by_rows(engine: LocalEngine):
    """For few rows, atomics add the experts' products in any order, here from the last expert to the first."""

    def make(layer, own):
        def run(x, weights, ids):
            if x.shape[0] > 16:
                return own(x, weights, ids)
            return one_expert_at_a_time(own, x, weights, ids, reversed(range(ids.shape[1])))

        return run

    return each_moe(engine, make)


def experts_of_one_row(engine: LocalEngine):
    """A prompt that is cached except for its last token gives the experts one row, which they add in another order."""

    def make(layer, own):
        def run(x, weights, ids):
            if x.shape[0] > 1:
                return own(x, weights, ids)
            return one_expert_at_a_time(own, x, weights, ids, range(ids.shape[1]))

        return run

    return each_moe(engine, make)


def combine_by_rank(engine: LocalEngine):
    """Experts on four data-parallel ranks: the addition of a row's parts starts at the row's own rank."""

    def run(stacked: torch.Tensor) -> torch.Tensor:
        ranks, m = stacked.shape[:2]
        out = torch.empty_like(stacked[0])
        for row in range(m):
            first = row * ranks // m
            total = stacked[first, row]
            for r in range(1, ranks):
                total = total + stacked[(first + r) % ranks, row]
            out[row] = total
        return out

    combine = parts.op("combine", "(Tensor parts) -> Tensor", run)

    def make(experts, own):
        def apply(x, weights, ids):  # expert i is on rank i % RANKS
            stacked = [own(x, torch.where(ids % RANKS == r, weights, 0.0), ids) for r in range(RANKS)]
            return combine(torch.stack(stacked))

        return apply

    return each_moe(engine, make)


FAULTS = (
    Fault(
        "cached prompt's last row",
        7,
        experts_of_one_row.__doc__,
        "prefix cache",
        experts_of_one_row,
        BOTH,
        "mlp.experts",
        seam=EXPERTS,
    ),
    Fault(
        "experts added by atomics",
        10,
        experts_by_rows.__doc__,
        "batch size",
        experts_by_rows,
        BOTH,
        "mlp.experts",
        seam=EXPERTS,
    ),
    Fault(
        "combine by data-parallel rank",
        16,
        combine_by_rank.__doc__,
        "position and order",
        combine_by_rank,
        BOTH,
        "mlp.experts",
        "combine",
        seam=EXPERTS,
        emulated=BOTH,
    ),
)
