"""Runs in a child process with TRITON_INTERPRET=1: PyTorch's products and sums, overridden on the CPU's dispatch key.

The bundled kernels run in Triton's interpreter. Each spelling is compared with fp64, and a row alone with the same row
among others, bitwise. Prints one line per spelling: `ok NAME` or `FAIL NAME: reason`.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from bi_patch.ops.cuda import aten, linear, machine  # noqa: E402

machine.shared_memory = lambda: 232448
M, K, N = 9, 70, 24


SPELLINGS = {
    "a @ b": lambda x, w, b: x @ w,
    "mm": lambda x, w, b: torch.mm(x, w),
    "mm.out": lambda x, w, b: torch.mm(x, w, out=torch.empty(len(x), N)),
    "matmul 3d": lambda x, w, b: (x[:, None] @ w)[:, 0],
    "linear": lambda x, w, b: torch.nn.functional.linear(x, w.t()),
    "linear with bias": lambda x, w, b: torch.nn.functional.linear(x, w.t(), b),
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
    "addmm scaled": lambda x, w, b: torch.addmm(b.expand(len(x), N), x, w, beta=0.5, alpha=2.0),
    "addmm.out": lambda x, w, b: torch.addmm(b, x, w, out=torch.empty(0)),
    "addmv": lambda x, w, b: torch.addmv(b[:1].expand(len(x)), x, w[:, 0]),
    "mv": lambda x, w, b: x.mv(w[:, 0]),
    "addmm_": lambda x, w, b: b.repeat(len(x), 1).addmm_(x, w),
    "baddbmm": lambda x, w, b: torch.baddbmm(b.expand(len(x), 1, N), x[:, None], w.expand(len(x), K, N))[:, 0],
    "bmm": lambda x, w, b: torch.bmm(x[:, None], w.expand(len(x), K, N))[:, 0],
    "bmm.out": lambda x, w, b: torch.bmm(x[:, None], w.expand(len(x), K, N), out=torch.empty(len(x), 1, N))[:, 0],
    "positions times frequencies": lambda x, w, b: (x[None, :, :1] @ b[None, None])[0],
    "sum": lambda x, w, b: x.sum(-1),
    "sum of a list": lambda x, w, b: x[:, None].sum((1, 2), keepdim=True),
    "sum of the middle": lambda x, w, b: x.reshape(len(x), 7, 10).sum(1),
    "sum.out": lambda x, w, b: torch.sum(x, 1, out=torch.empty(0)),
    "mean": lambda x, w, b: x.mean(-1, keepdim=True),
    "mean.out": lambda x, w, b: torch.mean(x, 1, out=torch.empty(len(x))),
    "mean of all": lambda x, w, b: x[:1].mean()[None],
}


def main() -> None:
    torch.manual_seed(5)
    x, w, b = torch.randn(M, K), torch.randn(K, N), torch.randn(N)
    want = {
        name: spell(x.double(), w.double(), b.double()) if ".out" not in name else None
        for name, spell in SPELLINGS.items()
    }
    aten.override("CPU")
    calls = []
    bundled, reduce = linear.bundled, aten._reduce
    linear.bundled = lambda *args: calls.append("product") or bundled(*args)
    aten._reduce = lambda *args, **kwargs: calls.append("sum") or reduce(*args, **kwargs)
    for name, spell in SPELLINGS.items():
        calls.clear()
        whole = spell(x, w, b)
        wrong = "" if calls else "PyTorch's own kernel served it"
        if want[name] is not None and not torch.allclose(whole.double(), want[name], rtol=1e-5, atol=1e-5):
            wrong = wrong or f"off by {(whole.double() - want[name]).abs().max():.1e}"
        for at, rows in ((0, 1), (4, 1), (2, 3)):
            if not torch.equal(spell(x[at : at + rows], w, b), whole[at : at + rows]) and name != "mean of all":
                wrong = wrong or f"rows {at} to {at + rows} differ"
        print(f"FAIL {name}: {wrong}" if wrong else f"ok {name}", flush=True)
    kept = torch.bmm(torch.empty(0, 2, K), torch.empty(0, K, N)).shape == (0, 2, N)
    print("ok bmm of nothing" if kept else "FAIL bmm of nothing", flush=True)
    kept = torch.arange(12).reshape(3, 4).sum(1).tolist() == [6, 22, 38]
    kept &= torch.ones(2, 3, dtype=torch.float64).mean(1).dtype == torch.float64
    print("ok integers and fp64" if kept else "FAIL integers and fp64", flush=True)


if __name__ == "__main__":
    main()
