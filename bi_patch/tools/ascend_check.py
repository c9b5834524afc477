"""Checks the bundled Ascend kernels on an NPU.

Each kernel is compared with fp64 on the CPU. Each row alone is compared bitwise with the same row in a batch.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from bi_patch.errors import SettingError

if TYPE_CHECKING:
    import torch

    from bi_patch.kernels.ascend.chips import Chip

COUNTS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257)
# The largest relative error against fp64 (Frobenius norms) that a kernel may have.
LIMIT = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}


def check(most: int = max(COUNTS)) -> dict[str, object]:
    """Run every kernel on `most` rows, and on each number of COUNTS up to `most`, on the current NPU.

    Returns the device, the versions of the libraries, and `rows`. Each row holds the number of elements compared, the
    number whose bits differ, the relative error, and `ok`: no bit differs and the error is below LIMIT.
    Raises SettingError for fewer than 1 row, MissingDependency without CANN, torch_npu or triton-ascend,
    UnsupportedDevice for an unknown chip.
    """
    if most < 1:
        raise SettingError(f"{most} rows are too few: take 1 or more")
    # torch would import torch_npu while torch_npu imports torch.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    from bi_patch.ops.ascend import machine

    machine.require()
    chip = machine.chip()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torch-npu", "triton-ascend")}
    rows = [row for dtype in LIMIT for row in _rows(chip, dtype, most)]
    return {"device": chip.name, **versions, "rows": rows}


def _rows(chip: Chip, dtype: str, most: int) -> Iterator[dict[str, object]]:
    """One result for each case, for one element type."""
    import torch

    bits = {2: torch.int16, 4: torch.int32}
    for name, run, right in _cases(chip, getattr(torch, dtype), most):
        whole = run(slice(0, most)).cpu()
        error = float((whole.double() - right).norm() / right.norm())
        compared = differing = 0
        for count in (c for c in COUNTS if c <= most):
            at = (most - count) // 2
            got, want = run(slice(at, at + count)).cpu().contiguous(), whole[at : at + count].contiguous()
            kind = bits[got.element_size()]
            compared += got.numel()
            differing += int((got.view(kind) != want.view(kind)).sum())
        ok = differing == 0 and error < LIMIT[dtype]
        yield {"case": f"{name} {dtype}", "compared": compared, "differing": differing, "error": error, "ok": ok}


def _cases(chip: Chip, dtype: torch.dtype, most: int) -> Iterator[tuple[str, Callable, torch.Tensor]]:
    """Each case: its name, the kernel as a function of a slice of the rows, and the fp64 answer from the CPU."""
    import torch

    from bi_patch.kernels.ascend import attention, matmul, rows

    torch.manual_seed(5)
    x, w, bias = torch.randn(most, 1024), torch.randn(1024, 512) / 32, torch.randn(512)
    norm, residual = torch.randn(1024), torch.randn(most, 1024)
    x, w, bias, norm, residual = (t.to(dtype) for t in (x, w, bias, norm, residual))
    on = [t.to("npu") for t in (x, w, bias, norm, residual)]
    wide = x.double()
    summed = (x + residual).double()
    rms = summed * (summed.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.double()
    yield (
        "matmul with bias",
        lambda s: matmul.matmul(on[0][None, s], on[1][None], chip, on[2])[0],
        wide @ w.double() + bias.double(),
    )
    yield "rms_norm with residual", lambda s: rows.rms_norm(on[0][s], on[3], 1e-6, chip, on[4][s])[0], rms
    yield "log_softmax", lambda s: rows.softmax(on[0][s], chip, torch.float32, True), wide.log_softmax(-1)
    yield "softmax", lambda s: rows.softmax(on[0][s], chip), wide.softmax(-1)
    yield "sum", lambda s: rows.total(on[0][s].abs(), chip), wide.abs().sum(-1)
    k, v = torch.randn(700, 2, 128).to(dtype), torch.randn(700, 2, 128).to(dtype)
    q = x.view(most, 8, 128)
    keys, values = (t.double().repeat_interleave(4, 1) for t in (k, v))
    p = (torch.einsum("thd,shd->hts", q.double(), keys) * 0.05).softmax(-1)
    held = [t.to("npu") for t in (q, k, v)]

    def attend(s):
        part = held[0][s]
        return attention.attention(part, held[1], held[2], [len(part)], [700], 0.05, chip, causal=False)

    yield "attention", attend, torch.einsum("hts,shd->thd", p, values)
