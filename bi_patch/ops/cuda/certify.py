"""The certificates of a CUDA worker: all are made at one moment, when the model is loaded.

Nothing has been compiled or captured by then, and vLLM has not yet measured how much memory is free. Where a
certificate fails, a kernel serves that keeps the order by construction (bi_patch.ops.certificates).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bi_patch.ops.certificates import Certificate
from bi_patch.ops.cuda import attention, linear, moe


def certify(
    linears: Iterable[linear.Problem],
    experts: Iterable[tuple[moe.Problem, moe.Kernel]],
    attentions: Iterable[tuple[attention.Problem, attention.Prefill]],
    *,
    max_rows: int,
    library: str,
    cache: Path,
) -> list[Certificate]:
    """Certify every linear, every size of experts and every shape of decode attention of one worker.

    max_rows: the most tokens of a step; products are certified up to so many rows. library: the version of vLLM, whose
    kernels are compared, and the switches that choose among them. cache: where certificates are kept. A problem may
    occur more than once and is certified once.
    """
    import torch

    made: list[Certificate | None] = [*linear.certify(linears, max_rows, cache)]
    for problem, kernel in experts:
        made.append(moe.certify(problem, kernel, max_rows, library, cache))
    for problem, prefill in attentions:
        made.append(attention.certify(problem, prefill, library, cache))
    torch.cuda.empty_cache()
    return [certificate for certificate in made if certificate is not None]
