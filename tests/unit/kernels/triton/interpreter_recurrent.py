"""Runs in a child process with TRITON_INTERPRET=1 and tests the gated norms of recurrent layers.

Prints one line per case: `ok NAME` or `FAIL NAME: reason`.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from bi_patch.kernels.triton import recurrent  # noqa: E402


def report(name: str, wrong: str) -> None:
    print(f"FAIL {name}: {wrong}" if wrong else f"ok {name}", flush=True)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> str:
    error = float((got.double() - want).norm() / want.norm())
    return "" if error < {torch.float16: 1e-3, torch.float32: 1e-6}[dtype] else f"relative error {error:.2e}"


def norms() -> None:
    generator = torch.Generator().manual_seed(12)
    for dtype in (torch.float16, torch.float32):
        x, gate = (torch.randn(6, 2, 48, generator=generator).to(dtype) for _ in range(2))
        weight = torch.randn(48, generator=generator).to(dtype)
        for sigmoid in (False, True):
            wide = gate.double()
            f = wide.sigmoid() if sigmoid else torch.nn.functional.silu(wide)
            exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() * f
            got = recurrent.gated_norm(x, gate, weight, 1e-5, sigmoid)
            report(f"gated norm {dtype} {sigmoid}", close(got.flatten(1), exact.flatten(1), dtype))
            alone = recurrent.gated_norm(x[3:4], gate[3:4], weight, 1e-5, sigmoid)
            report(f"gated norm {dtype} {sigmoid} alone", "" if torch.equal(alone, got[3:4]) else "a row differs")
        # A gate before the norm: two groups of 48 in a row, and the gate is a part of a wider tensor.
        x, gate = x.view(6, 96), torch.randn(6, 200, generator=generator).to(dtype)[:, 3:99]
        weight = torch.randn(96, generator=generator).to(dtype)
        y = (x.double() * torch.nn.functional.silu(gate.double())).view(6, 2, 48)
        exact = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(6, 96) * weight.double()
        got = recurrent.gated_first_norm(x, gate, weight, 1e-5, 2)
        report(f"gated first norm {dtype}", close(got, exact, dtype))
        alone = recurrent.gated_first_norm(x[3:4], gate[3:4], weight, 1e-5, 2)
        report(f"gated first norm {dtype} alone", "" if torch.equal(alone, got[3:4]) else "a row differs")


if __name__ == "__main__":
    norms()
