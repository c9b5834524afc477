"""On an NPU: every bundled kernel against fp64 on the CPU, and each row alone, bitwise, over numbers of rows.

Prints one JSON object: device, library versions, and for each case the elements compared, those that differ
and the relative error.
Exit code 1 when a bit differs or an error is large. Needs CANN, torch_npu and triton-ascend; `--rows N`
takes fewer rows.
"""

import importlib.metadata
import json
import sys

import torch
import torch_npu  # noqa: F401

from bi_patch.kernels.ascend import attention, matmul, rows
from bi_patch.ops.ascend import machine

COUNTS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257)
LIMIT = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def cases(chip, dtype, most: int):
    """name -> (inputs, function of a slice of rows, right in fp64)."""
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


def main() -> int:
    machine.require()
    chip = machine.chip()
    most = int(sys.argv[sys.argv.index("--rows") + 1]) if "--rows" in sys.argv else max(COUNTS)
    found = []
    for dtype in LIMIT:
        bits = {2: torch.int16, 4: torch.int32}
        for name, run, right in cases(chip, dtype, most):
            whole = run(slice(0, most)).cpu()
            error = float((whole.double() - right).norm() / right.norm())
            compared = differing = 0
            for count in (c for c in COUNTS if c <= most):
                at = (most - count) // 2
                got, want = run(slice(at, at + count)).cpu().contiguous(), whole[at : at + count].contiguous()
                kind = bits[got.element_size()]
                compared += got.numel()
                differing += int((got.view(kind) != want.view(kind)).sum())
            case = f"{name} {str(dtype).removeprefix('torch.')}"
            ok = differing == 0 and error < LIMIT[dtype]
            found.append({"case": case, "compared": compared, "differing": differing, "error": error, "ok": ok})
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torch-npu", "triton-ascend")}
    print(json.dumps({"device": chip.name, **versions, "rows": found}, indent=1))
    return 0 if all(row["ok"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
