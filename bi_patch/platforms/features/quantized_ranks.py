"""Quantized weights that tensor-parallel ranks share: a row for each kind that a run had, and one for all others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bi_patch.platforms import schemes
from bi_patch.platforms.features import scheme_kinds as kinds
from bi_patch.platforms.features.model import Cell, Feature, refused, row, served, untried
from bi_patch.platforms.features.ranks import size
from bi_patch.platforms.schemes import CHANNEL, TOKEN, Scheme

_CPU = "invariance-2026-11-30-cpu-ranks-vllm-0.32.0.json"
_CPU_MORE = "invariance-2026-11-30-cpu-ranks-vllm-0.32.0-3.json"
_CPU_UPDATES = "invariance-2026-11-30-cpu-ranks-vllm-0.32.0-4.json"
_BOTH = "in eager mode and compiled"
_ALONE = refused("nobody has compared bits of both together", todo="Use one of them")
_NO_SEAM = refused("no patch point covers it yet")
_H200 = "invariance-2026-11-30-h200-ranks-vllm-0.33.0-4.json"
_MORE = "invariance-2026-11-30-h200-ranks-vllm-0.33.0-5.json"
_LAST = "invariance-2026-11-30-h200-ranks-vllm-0.33.0-6.json"
_FOUR = "invariance-2026-11-30-h200-ranks-vllm-0.33.0-7.json"


def _shown(*files: str, why: str) -> tuple[Cell, Cell]:
    return untried("measured on vLLM 0.33", releases="<0.33"), served(*files, why=why)


def _is(*methods: str, kind: Callable[[Scheme], bool]) -> Callable[[Scheme], bool]:
    return lambda scheme: scheme.method in methods and not scheme.head and kind(scheme)


INT8, AWQ, GPTQ, FOUR_BITS = "INT8 weights and activations", "AWQ", "GPTQ", "compressed-tensors W4A16"
CHANNELS, BLOCKS, MXFP4 = "FP8 per channel", "FP8 blocks of 128 x 128", "MXFP4"
NVFP4 = "compressed-tensors NVFP4 without activations in NVFP4"
# By name: whether a scheme is of the kind. Groups of K and blocks are whole on every rank.
KINDS: dict[str, Callable[[Scheme], bool]] = {
    INT8: _is("compressed-tensors", kind=lambda s: kinds.int8(s, TOKEN, static=False)),
    AWQ: _is("awq", kind=kinds.int4("awq")),
    GPTQ: _is("gptq", kind=kinds.int4("gptq")),
    FOUR_BITS: _is("compressed-tensors", kind=lambda s: kinds.weight_only(s, 4) and not (s.zeros or s.order)),
    CHANNELS: _is("compressed-tensors", kind=lambda s: kinds.fp8(s, CHANNEL, TOKEN)),
    BLOCKS: _is("fp8", kind=kinds.blocks),
    MXFP4: _is("mxfp4", kind=kinds.mxfp4),
    NVFP4: _is("compressed-tensors", kind=kinds.nvfp4),
}
# Kinds and whether the model has experts: the cells of CPU and CUDA.
_CELLS: dict[tuple[str, bool], tuple[Cell, Cell | tuple[Cell, Cell]]] = {
    (INT8, False): (
        served(_CPU, _CPU_MORE, _CPU_UPDATES, why=f"two ranks, a tiny Qwen3, without AMX, {_BOTH}; new weights, too"),
        _shown(_MORE, _FOUR, why=f"two layers of Qwen3-8B's sizes, {_BOTH}"),
    ),
    (AWQ, False): (
        served(
            _CPU,
            _CPU_MORE,
            _CPU_UPDATES,
            why=f"two ranks, a tiny Qwen2, without AMX, {_BOTH}; new weights, too",
        ),
        _shown(_H200, _MORE, why=f"two layers of Qwen3-8B's sizes, {_BOTH}"),
    ),
    (GPTQ, False): (
        served(_CPU_MORE, why=f"two ranks, a tiny Llama, without AMX, {_BOTH}"),
        _shown(_MORE, _FOUR, why=f"two layers of Qwen3-8B's sizes, {_BOTH}"),
    ),
    (FOUR_BITS, False): (
        served(_CPU_MORE, why=f"two ranks, a tiny Qwen3, without AMX, {_BOTH}"),
        _shown(_LAST, _FOUR, why=f"two layers of Qwen3-8B's sizes, {_BOTH}"),
    ),
    (CHANNELS, False): (_ALONE, _shown(_H200, _FOUR, why=f"two layers of Qwen3-8B's sizes, {_BOTH}")),
    (BLOCKS, False): (_ALONE, _shown(_H200, _MORE, why=f"two layers of Qwen3-8B's sizes, {_BOTH}")),
    (NVFP4, False): (_ALONE, _shown(_FOUR, why=f"two layers of Qwen3-8B's sizes, {_BOTH}")),
    (FOUR_BITS, True): (_ALONE, _shown(_LAST, why=f"two layers of Qwen3-30B-A3B's sizes, {_BOTH}")),
    (CHANNELS, True): (
        _ALONE,
        _shown(_LAST, _FOUR, why=f"two layers of Qwen3-30B-A3B's sizes, {_BOTH}"),
    ),
    (BLOCKS, True): (
        _ALONE,
        _shown(
            _H200,
            _MORE,
            _LAST,
            why=f"two layers of Qwen3-30B-A3B's and MiniMax-M2's sizes, {_BOTH}",
        ),
    ),
    (MXFP4, True): (
        _ALONE,
        _shown(
            _MORE,
            _FOUR,
            why=f"two layers of gpt-oss-20b's sizes, {_BOTH}, with the package humming-kernels",
        ),
    ),
}
_RANKS = 2
# Of _CELLS, those that runs on CUDA had over four ranks, in eager mode and compiled.
OVER_FOUR: tuple[tuple[str, bool], ...] = ((BLOCKS, False),)


def _kind(config: Any) -> tuple[str, bool] | None:
    """Which of _CELLS the quantized weights of an engine are, all of them; None for others."""
    used, experts = schemes.of(config), bool(getattr(config.model_config, "is_moe", False))
    named = next((name for name, kind in KINDS.items() if used and all(map(kind, used))), "")
    return (named, experts) if (named, experts) in _CELLS else None


def _shared(config: Any) -> bool:
    quantized = getattr(config.model_config, "quantization", None) is not None
    return quantized and size(config, "tensor_parallel_size") > 1


def _of(kind: tuple[str, bool] | None) -> Callable[[Any], str]:
    def asked(config: Any) -> str:
        there = config.model_config is not None and _shared(config) and _kind(config) == kind
        return "quantized weights with tensor parallelism" if there else ""

    return asked


def _known(config: Any) -> tuple[str, bool] | None:
    """The kind of quantized weights that ranks share, None for others, which have a row of their own."""
    return _kind(config) if config.model_config is not None and _shared(config) else None


def _four(config: Any) -> str:
    four = _known(config) in OVER_FOUR and size(config, "tensor_parallel_size") == 2 * _RANKS
    return "quantized weights over four ranks" if four else ""


def _many(config: Any) -> str:
    several = _known(config) is not None and size(config, "tensor_parallel_size") > _RANKS
    return "quantized weights with other tensor parallelism" if several and not _four(config) else ""


def _named(measured: Iterable[tuple[str, bool]]) -> str:
    return ", ".join(f"{name}{' with experts' * experts}" for name, experts in measured)


def _row(kind: tuple[str, bool], cpu: Cell, cuda: Cell | tuple[Cell, Cell]) -> Feature:
    name, experts = kind
    words = f"{name}{', with experts' * experts}, with tensor parallelism"
    return row(words, cpu=cpu, cuda=cuda, ascend=_NO_SEAM, asked=_of(kind))


SHARED: tuple[Feature, ...] = (
    *(_row(kind, *given) for kind, given in _CELLS.items()),
    row(
        "other quantized weights with tensor parallelism",
        cpu=_ALONE,
        cuda=untried(),
        ascend=_NO_SEAM,
        asked=_of(None),
    ),
    row(
        f"{_named(OVER_FOUR)}, with tensor parallelism over four ranks",
        cpu=untried("measured with two ranks"),
        cuda=_shown(_FOUR, why=f"two layers of Qwen3-8B's sizes, {_BOTH}"),
        ascend=_NO_SEAM,
        asked=_four,
    ),
    row(
        f"quantized weights with tensor parallelism over more than two ranks (but {_named(OVER_FOUR)} over four)",
        cpu=untried("measured with two ranks"),
        cuda=untried("measured with two ranks"),
        ascend=_NO_SEAM,
        asked=_many,
    ),
)
