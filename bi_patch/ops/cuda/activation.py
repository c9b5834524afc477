"""Forms of SwiGLU on CUDA by bundled kernels (kernels/cuda/gated.cu). torch.compile does not trace into the op.

Where the certificate of a form and a type fails, vLLM's kernel serves, with the same bits and more slowly. An element
depends on its two inputs alone, so the certificate compares every gate.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bi_patch.ops import bits, certificates
from bi_patch.ops.certificates import Certificate, Key, Tally
from bi_patch.ops.cuda import machine
from bi_patch.ops.registration import define

if TYPE_CHECKING:
    import torch

OPERATION = "cuda.gated"
DATA = "every gate, beside numbers of all sizes, infinities and zeros"
SILU, PAIRS = "silu_and_mul", "swigluoai_and_mul"  # vLLM's names
_ALPHA, _LIMIT = 1.702, 7.0  # of PAIRS, as vLLM takes them unless told otherwise
_UPS = 1, -1.3, 0.0078, 3e4, 6e-8, -9, -0.0, float("inf")
_WIDE = 8192
_certified: dict[tuple[str, torch.dtype], bool] = {}
# Whether SILU counts -0 in the second half as 0: vLLM's release decides.
_adds_zero: dict[torch.dtype, bool] = {}


def define_op() -> None:
    """Define torch.ops.bi_patch.scaled_silu_and_mul. A second call does nothing."""
    define(
        "scaled_silu_and_mul(Tensor x, float factor) -> Tensor",
        _run,
        "CUDA",
        lambda x, _: x.new_empty(x.shape[0], x.shape[1] // 2),
    )


def covers(columns: int, dtype: torch.dtype) -> bool:
    """Whether the bundled kernels take gates of `columns` elements of this type."""
    from bi_patch.kernels.cuda import gated

    return gated.covers(columns, dtype)


def scaled_silu_and_mul(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """silu(factor * x[:, :C]) * x[:, C:] of x [tokens, 2 C] (bf16, fp16) -> [tokens, C], each step rounded."""
    import torch

    return torch.ops.bi_patch.scaled_silu_and_mul(x, factor)


def swigluoai_and_mul(out: torch.Tensor, x: torch.Tensor) -> bool:
    """Write gpt-oss's SwiGLU of x [rows, 2 C], pairs of gate and up, to out [rows, C].

    Returns False, and writes nothing, without a certificate and for tensors that the bundled kernel does not take.
    """
    from bi_patch.kernels.cuda import gated

    if not _certified.get((PAIRS, x.dtype)) or not covers(out.shape[1], x.dtype):
        return False
    if not out.is_contiguous() or out.data_ptr() % 16:
        return False
    gated.run_pairs(x, out, _ALPHA, _LIMIT)
    return True


def certify(form: str, dtype: torch.dtype, library: str, cache: Path) -> Certificate | None:
    """Compare a bundled kernel with vLLM's. form: SILU or PAIRS. library: vLLM's version. cache: certificates' folder.

    Every process makes the certificate anew: the certificate on disk could be about another build of vLLM's kernel.
    Returns None for what this process has certified before, and for a type that the kernels do not cover.
    """
    from bi_patch.kernels.cuda import nvrtc

    if (form, dtype) in _certified or not covers(_WIDE, dtype):
        return None
    nvrtc.folder = cache / "cubins"
    _certified[form, dtype] = False
    libraries, kernels = f"{library} {machine.libraries()}", machine.kernels_digest("cuda")
    key = Key(OPERATION, f"{form} {machine.name(dtype)}", machine.device(), libraries, kernels, DATA)
    made = certificates.obtain(cache, key, lambda: _certify(form, dtype, key), instead="vLLM's kernel", anew=True)
    _certified[form, dtype] = made.passed
    return made


def _certify(form: str, dtype: torch.dtype, key: Key, device: str = "cuda") -> Certificate:
    import torch

    gates = torch.arange(65536, dtype=torch.int32, device=device).to(torch.int16).view(dtype).view(-1, _WIDE)
    tally = Tally([len(gates)])
    if form == SILU:
        x = torch.tensor([[1.0] * 8 + [-0.0] * 8], dtype=dtype, device=device)
        _adds_zero[dtype] = not bool(_vllms(form, x).signbit().any())
    for up in _UPS:
        halves = gates, torch.full_like(gates, up)
        x = torch.cat(halves, 1) if form == SILU else torch.stack(halves, 2).flatten(1)
        # A NaN may have other bits.
        got, want = (out.masked_fill(out.isnan(), 7) for out in (_bundled(form, x), _vllms(form, x)))
        said = f"up {up}: %d of {got.numel()} elements differ"
        tally.add_later(got.numel(), bits.count(got, want), said.__mod__)
    return tally.certificate(key, "bundled")


def _bundled(form, x):
    import torch

    from bi_patch.kernels.cuda import gated

    if form == SILU:
        return gated.run(x, 1.0, _adds_zero[x.dtype])
    out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype, device=x.device)
    gated.run_pairs(x, out, _ALPHA, _LIMIT)
    return out


def _vllms(form, x):
    import torch

    out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype, device=x.device)
    getattr(torch.ops._C, form)(out, x)
    return out


def _run(x, factor):
    import torch

    from bi_patch.kernels.cuda import gated

    if _certified.get((SILU, x.dtype)):
        return gated.run(x, factor, _adds_zero[x.dtype])
    if factor != 1:
        gate, up = x.chunk(2, 1)
        x = torch.cat([gate * factor, up], 1)
    return _vllms(SILU, x)
