"""The bundled CPU kernels: built once a machine, loaded once a process, and what identifies them in certificates."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from bi_patch.errors import CertificateFailed

if TYPE_CHECKING:
    import torch

_isa: str | None = None
_library = ""  # the built library's name: instruction set and digest of sources and compiler


def load_kernels(cache: Path) -> str:
    """Build (first time on a machine) and load the bundled kernels; returns their instruction set.

    Raises CertificateFailed when they cannot be built: without them CPU attention has no invariant route.
    """
    global _isa, _library
    if _isa is None:
        from bi_patch.kernels import cpu as kernels

        try:
            _isa = kernels.load(cache / "kernels")
            _library = kernels.build(cache / "kernels").stem
        except kernels.KernelBuildError as error:
            raise CertificateFailed(f"the bundled CPU kernels are not available: {error}") from error
    return _isa


@functools.cache
def device() -> str:
    """The CPU's model, instruction set of the bundled kernels, and number of threads."""
    import torch

    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    amx = "amx" if torch.cpu._is_amx_tile_supported() else "no amx"
    return f"{model}, {amx}, {_isa}, {torch.get_num_threads()} threads"


@functools.cache
def libraries() -> str:
    """Versions of the libraries whose CPU kernels can be a route."""
    import torch
    from vllm.version import __version__ as vllm_version

    return f"vllm {vllm_version}, torch {torch.__version__}"


def kernels_digest() -> str:
    """What identifies the bundled kernels: their instruction set, sources and compiler."""
    return _library


def kv_store(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write keys and values [tokens, kv heads, head size] into their slots of the paged cache."""
    import torch

    torch.ops.bi_cpu.kv_store(key, value, kv_cache, slot_mapping)


def attention(
    out: torch.Tensor,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Causal attention over the paged cache into `out` [tokens, heads, head size] (or flattened heads).

    window: tokens before its own that a query sees, -1 for all; softcap: 0 for none.
    """
    import torch

    torch.ops.bi_cpu.attention(
        out.view(query.shape), query, kv_cache, query_start_loc, seq_lens, block_table, scale, window, float(softcap)
    )


def covers(x: torch.Tensor, weight: torch.Tensor | None = None) -> bool:
    """Whether the bundled row kernels take x: their dtypes, and a weight of the same."""
    import torch

    known = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and (weight is None or weight.dtype == x.dtype)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, residual: torch.Tensor | None = None, offset: float = 0.0
):
    """RMSNorm of x [..., C] times (weight + offset); with a residual, (norm of x + residual, x + residual)."""
    import torch

    if residual is None:
        return torch.ops.bi_cpu.rms_norm(x, weight, eps, offset)
    return torch.ops.bi_cpu.add_rms_norm(x, residual, weight, eps, offset)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(x[..., :D]) * x[..., D:] of x [..., 2 D], rounded once."""
    import torch

    return torch.ops.bi_cpu.silu_and_mul(x)


def rope(positions: torch.Tensor, x: torch.Tensor, cache: torch.Tensor, head_size: int, neox: bool) -> torch.Tensor:
    """x [tokens, heads * D] rotated by positions [tokens]; cache [positions, rotary]: cosines, then sines."""
    import torch

    return torch.ops.bi_cpu.rope(positions, x, cache, head_size, neox)


def route(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax routing of logits [rows, experts]: weights (fp32) and ids (int32) [rows, top_k], ties by the lower id."""
    import torch

    return torch.ops.bi_cpu.route(logits, top_k, renormalize)
