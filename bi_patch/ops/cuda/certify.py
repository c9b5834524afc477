"""The certificates of a CUDA worker. All are made at one moment, when the model is loaded.

At that moment vLLM has compiled and captured nothing, and has not measured the free memory. If the certificate of a
linear, of experts, of a gated activation or of decode attention fails, another kernel serves, which keeps the order by
construction. For the other certificates there is no such kernel, so the engine stops (bi_patch.ops.certificates).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bi_patch.ops import certificates
from bi_patch.ops.certificates import Certificate
from bi_patch.ops.cuda import (
    activation,
    attention,
    chunks,
    factored_linear,
    linear,
    machine,
    moe,
    packed_experts,
    packed_linear,
    prompts,
    rows,
    scaled_linear,
    spans,
)
from bi_patch.ops.cuda.ahead import Ahead
from bi_patch.ops.row_checks import RowCheck

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("vllm.bi_patch")
_PRODUCTS = linear, scaled_linear, factored_linear, packed_linear, packed_experts


def begin(checks: Callable[[], Iterable[RowCheck]], library: str, cache: Path) -> Ahead:
    """Start to compile what the certificates of `checks` launch, as far as they are not in `cache`.

    checks: those that need no model, so that threads compile their kernels while the model loads. Call `certify` with
    the result. library, cache: as for `certify`.
    """
    import torch

    ahead = Ahead()

    def call():
        machine.device()  # without a device, import nothing
        for check in checks():
            rows.rehearse(check, library, cache, ahead)

    with certificates.clock("compile"), torch.inference_mode():
        _try(call)
    return ahead


def certify(
    linears: Iterable[
        linear.Problem
        | scaled_linear.Problem
        | factored_linear.Problem
        | packed_linear.Problem
        | packed_experts.Problem
    ],
    experts: Iterable[tuple[moe.Problem, moe.Kernel]],
    decoders: Iterable[tuple[attention.Problem, attention.Prefill]],
    attentions: Iterable[
        tuple[chunks.Problem, chunks.Prepare]
        | tuple[prompts.Problem, prompts.Attend]
        | tuple[spans.Problem, spans.Prepare]
    ],
    checks: Iterable[RowCheck],
    *,
    max_rows: int,
    library: str,
    cache: Path,
    ahead: Ahead | None = None,
    others: int = 0,
    activations: Iterable[tuple[str, torch.dtype]] = (),
) -> list[Certificate]:
    """Certify every linear, every kind of experts and of attention, and the rows of all other operations of one worker.

    max_rows: the maximum number of tokens of a step. Linears and experts are certified for up to max_rows rows.
    others: the rows that other ranks may add for the experts. activations: form and type of gated activations.
    library: the version of vLLM, whose kernels are compared, and the switches that choose among these kernels. cache:
    the folder of certificates. ahead: what `begin` started. A problem that occurs several times is certified once.
    Returns all certificates, in the order of the arguments, with failed certificates of linears, experts and decoders.
    Raises CertificateFailed for attention or another operation whose certificate failed.
    """
    import torch

    linears, experts, attentions, checks = (list(given) for given in (linears, experts, attentions, checks))
    first, rest = Ahead(), ahead or Ahead()
    with certificates.clock("other"):
        with certificates.clock("compile"), torch.inference_mode():
            _rehearse_products(linears, experts, max_rows, others, library, cache, first)
            _rehearse_rows(attentions, checks, library, cache, rest)
            first.finish()
        made: list[Certificate | None] = []
        # Threads compile the rest meanwhile. A kernel of the rest that fails there fails a certificate that needs it.
        for module in _PRODUCTS:
            made += module.certify(_of(module, linears), max_rows, cache)
        for problem, kernel in experts:
            made.append(moe.certify(problem, kernel, max_rows + others, library, cache))
        with certificates.clock("compile"):
            rest.finish()
        for decoder, prefill in decoders:
            made.append(attention.certify(decoder, prefill, library, cache))
        made += (activation.certify(*given, library, cache) for given in activations)
        with torch.inference_mode():
            chunked = [_attention(layer).certify(layer, run, library, cache) for layer, run in attentions]
            among_rows = [rows.certify(check, library, cache) for check in checks]
        torch.cuda.empty_cache()
    certificates.require(chunked, "Try --attention-backend TRITON_ATTN, or FLASH_ATTN on Hopper. ")
    certificates.require(among_rows)
    return [certificate for certificate in (*made, *chunked, *among_rows) if certificate is not None]


def _rehearse_products(linears, experts, max_rows, others, library, cache, ahead) -> None:
    """Rehearse the certificates of experts and linears."""
    for problem, kernel in dict(experts).items():
        _try(lambda p=problem, k=kernel: moe.rehearse(p, k, max_rows + others, library, cache, ahead))
    for module in _PRODUCTS:
        for problem in dict.fromkeys(_of(module, linears)):
            _try(lambda p=problem, m=module: m.rehearse(p, max_rows, cache, ahead))


def _rehearse_rows(attentions, checks, library, cache, ahead) -> None:
    """Rehearse the certificates of attention and of all other operations."""
    for problem, run in attentions:
        _try(lambda p=problem, r=run: _attention(p).rehearse(p, r, library, cache, ahead))
    for check in checks:
        _try(lambda c=check: rows.rehearse(c, library, cache, ahead))


def _of(module, linears) -> list:
    """The problems of one module of operations."""
    return [problem for problem in linears if isinstance(problem, module.Problem)]


def _attention(problem):
    """The module of operations that certifies a kind of attention layer."""
    return next((module for module in (prompts, spans) if isinstance(problem, module.Problem)), chunks)


def _try(call: Callable[[], object]) -> None:
    """Run `call`. Its errors are no matter here: what fails will fail again where the certificate is made."""
    try:
        call()
    except Exception:
        _log.debug("bi_patch: no rehearsal", exc_info=True)
