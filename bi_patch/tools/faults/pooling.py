"""A fault of poolers: what is pooled of one sequence passes through a sum over all rows of the step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bi_patch.tools.faults.base import CPU, Fault
from bi_patch.tools.verify import layers
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.runner import replaced

AXIS = "pooled vectors"


@contextlib.contextmanager
def sum_over_the_batch(engine: LocalEngine) -> Iterator[None]:
    """Mean pooling takes a sequence's sum as the difference of two running sums over all rows of the batch."""
    from bi_patch.seams import pooling

    def make(held):
        def forward(hidden_states, pooling_metadata):
            cursor = pooling_metadata.get_pooling_cursor()
            first, last = cursor.first_token_indices_gpu.long(), cursor.last_token_indices_gpu.long()
            wide = hidden_states.float()
            running = wide.cumsum(0)
            sums = running[last] - (running[first] - wide[first])
            return sums / cursor.prompt_lens_cpu.to(sums.device)[:, None]

        return forward

    with contextlib.ExitStack() as stack:
        for module in pooling.modules(layers.model(engine)):
            if type(module).__name__ == "MeanPool":
                stack.enter_context(replaced(module, "forward", make))
        yield


FAULTS = (
    Fault(
        "mean from sums over the batch",
        33,
        sum_over_the_batch.__doc__,
        AXIS,
        sum_over_the_batch,
        (CPU,),
        "pooler",
        seam={"cpu": "pooling.cpu_mean"},
    ),
)
