"""The certificates of a CUDA worker. All are made at one moment, when the model is loaded.

At that moment vLLM has compiled and captured nothing, and has not measured the free memory. If a certificate fails,
another kernel serves, which keeps the order by construction (bi_patch.ops.certificates).
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

    max_rows: the maximum number of tokens of a step. Linears and experts are certified for up to max_rows rows.
    library: the version of vLLM, whose kernels are compared, and the switches that choose among these kernels. cache:
    the folder of certificates. A problem that occurs several times is certified once. Returns the certificates of
    linears, experts and attention, in this order, failed certificates included.
    """
    import torch

    made: list[Certificate | None] = [*linear.certify(linears, max_rows, cache)]
    for problem, kernel in experts:
        made.append(moe.certify(problem, kernel, max_rows, library, cache))
    for problem, prefill in attentions:
        made.append(attention.certify(problem, prefill, library, cache))
    torch.cuda.empty_cache()
    return [certificate for certificate in made if certificate is not None]
