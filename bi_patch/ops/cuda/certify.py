"""The certificates of a CUDA worker. All are made at one moment, when the model is loaded.

At that moment vLLM has compiled and captured nothing, and has not measured the free memory. If the certificate of a
linear, of experts or of decode attention fails, another kernel serves, which keeps the order by construction. For the
other certificates there is no such kernel, so the engine stops (bi_patch.ops.certificates).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bi_patch.ops import certificates
from bi_patch.ops.certificates import Certificate
from bi_patch.ops.cuda import attention, chunks, linear, moe, rows
from bi_patch.ops.row_checks import RowCheck


def certify(
    linears: Iterable[linear.Problem],
    experts: Iterable[tuple[moe.Problem, moe.Kernel]],
    decoders: Iterable[tuple[attention.Problem, attention.Prefill]],
    attentions: Iterable[tuple[chunks.Problem, chunks.Prepare]],
    checks: Iterable[RowCheck],
    *,
    max_rows: int,
    library: str,
    cache: Path,
) -> list[Certificate]:
    """Certify every linear, every kind of experts and of attention, and the rows of all other operations of one worker.

    max_rows: the maximum number of tokens of a step. Linears and experts are certified for up to max_rows rows.
    library: the version of vLLM, whose kernels are compared, and the switches that choose among these kernels. cache:
    the folder of certificates. A problem that occurs several times is certified once. Returns all certificates, in the
    order of the arguments, with failed certificates of linears, experts and decoders.
    Raises CertificateFailed for attention or another operation whose certificate failed.
    """
    import torch

    made: list[Certificate | None] = [*linear.certify(linears, max_rows, cache)]
    for problem, kernel in experts:
        made.append(moe.certify(problem, kernel, max_rows, library, cache))
    for problem, prefill in decoders:
        made.append(attention.certify(problem, prefill, library, cache))
    with torch.inference_mode():
        chunked = [chunks.certify(problem, prepare, library, cache) for problem, prepare in attentions]
        among_rows = [rows.certify(check, library, cache) for check in checks]
    torch.cuda.empty_cache()
    certificates.require(chunked, "Try --attention-backend TRITON_ATTN, or FLASH_ATTN on Hopper. ")
    certificates.require(among_rows)
    return [certificate for certificate in (*made, *chunked, *among_rows) if certificate is not None]
