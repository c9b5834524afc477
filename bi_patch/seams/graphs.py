"""Rules on compiled graphs that every platform shares: one graph serves every number of tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, is_dataclass
from typing import Any

from bi_patch.errors import UnsupportedFeature

# vLLM's compilation mode in which Dynamo guards on shapes and compiles anew, so that one token gets a graph of its own.
_STOCK = "STOCK_TORCH_COMPILE"

# Inductor's options that vLLM sets itself, and that change neither a sum nor how a kernel is chosen.
_INDUCTOR = frozenset(
    {
        "alignment_asserts",
        "benchmark_combo_kernel",  # turned off on CUDA
        "combo_kernels",
        "cpp.dynamic_threads",
        "dce",
        "enable_auto_functionalized_v2",
        "epilogue_fusion",
        "nan_asserts",
        "scalar_asserts",
        "size_asserts",
    }
)


def one_range(config: Any) -> None:
    """Leave one compiled range, from one token to the engine's largest step.

    vLLM adds a bound for each of the user's `compile_ranges_endpoints`, and one for each pass that fuses small steps
    only. A bound stays after its pass is turned off. The largest bound is the engine's largest step.
    """
    compilation = config.compilation_config
    bounds = getattr(compilation, "compile_ranges_endpoints", None)
    if bounds:
        compilation.compile_ranges_endpoints = [max(bounds)]


def refuse_sizes(name: str, config: Any) -> None:
    """Raise UnsupportedFeature, with the policy's `name`, if the user asks for graphs of single sizes."""
    sizes = getattr(config.compilation_config, "compile_sizes", None)
    if sizes:
        raise UnsupportedFeature(
            f"{name}: compile_sizes {sizes} makes separate code for these numbers of tokens, and such code may sum in "
            "another order. Leave compile_sizes out, or set BI_PATCH=0"
        )


def check_inductor(config: Any) -> None:
    """Raise UnsupportedFeature for options of Inductor outside of a list, e.g. `deterministic` or `max_autotune`.

    Code is the affair of the policy plugins.code.
    """
    given = getattr(config.compilation_config, "inductor_compile_config", None) or {}
    found = sorted(name for name, value in given.items() if name not in _INDUCTOR and not callable(value))
    if found:
        raise UnsupportedFeature(
            f"compilation.inductor: inductor_compile_config sets {', '.join(found)}, which nobody has examined. "
            "Inductor may then choose kernels by time, anew in each process. Leave it out, or set BI_PATCH=0"
        )


def check_mode(name: str, config: Any, allowed: Collection[str]) -> None:
    """Raise UnsupportedFeature, with the policy's `name`, for a compilation mode that is not in `allowed`."""
    mode = getattr(config.compilation_config, "mode", None)
    found = getattr(mode, "name", mode)
    if found is not None and found not in allowed:
        why = "compiles a graph of its own for one token" if found == _STOCK else "was not examined on this platform"
        raise UnsupportedFeature(
            f"{name}: compilation mode {found} {why}, and such a graph may sum in another order. Leave the mode out, "
            "pass --enforce-eager, or set BI_PATCH=0"
        )


def check_operators(config: Any) -> None:
    """Raise UnsupportedFeature if the user chose implementations of vLLM's operators (`ir_op_priority`)."""
    given = getattr(getattr(config, "kernel_config", None), "ir_op_priority", None)
    if not is_dataclass(given):
        return
    from vllm.platforms import current_platform

    usual = current_platform.get_default_ir_op_priority(config)
    found = [f.name for f in fields(given) if list(getattr(given, f.name)) != list(getattr(usual, f.name))]
    if found:
        raise UnsupportedFeature(
            f"compilation.operators: ir_op_priority for {', '.join(found)} calls kernels that bi_patch does not cover, "
            "and the shape of a batch decides which of them runs. Leave ir_op_priority out, or set BI_PATCH=0"
        )
