"""Runs in a child process with TRITON_INTERPRET=1 and tests the kernels of gated delta nets.

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


class Delta:
    """A gated delta net: one head of keys, two of values, 32 wide, and 20 tokens of one request."""

    H, HV, D, TOKENS = 1, 2, 32, 20

    def __init__(self):
        generator = torch.Generator().manual_seed(11)
        self.channels = 2 * self.H * self.D + self.HV * self.D
        rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.x = rand(self.TOKENS, self.channels + 8).half()[:, : self.channels]
        self.weight = rand(self.channels, 4).half()
        self.a, self.b = rand(self.TOKENS, self.HV).half(), rand(self.TOKENS, self.HV).half()
        self.A_log, self.bias = rand(self.HV), rand(self.HV)

    def states(self):
        return torch.full((5, 3, self.channels), 7.0).half(), torch.full((5, self.HV, self.D, self.D), 9.0)

    def run(self, held, rows, starts, slots, fresh):
        given = [
            torch.tensor(v, dtype=t) for v, t in zip((starts, slots, fresh), (torch.int32, torch.int32, torch.int8))
        ]
        x, a, b = (torch.cat([t[r] for r in rows]) for t in (self.x, self.a, self.b))
        y = recurrent.causal_conv(x, self.weight, held[0], *given)
        out = torch.zeros(len(x), self.HV, self.D).half()
        recurrent.delta(out, y, a, b, self.A_log, self.bias, held[1], *given, self.H)
        return out

    def exact(self):
        x = torch.nn.functional.pad(self.x.double().T, (3, 0)).unsqueeze(0)
        x = torch.nn.functional.conv1d(x, self.weight.double().unsqueeze(1), groups=self.channels)[0].T
        x = torch.nn.functional.silu(x).half().double()
        q, k, v = x.split([self.H * self.D, self.H * self.D, self.HV * self.D], -1)
        q, k = (t.view(-1, self.H, self.D).repeat_interleave(self.HV // self.H, 1) for t in (q, k))
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        v, beta = v.view(-1, self.HV, self.D), self.b.double().sigmoid()
        decay = -self.A_log.double().exp() * torch.nn.functional.softplus(self.a.double() + self.bias.double())
        state, out = torch.zeros(self.HV, self.D, self.D).double(), []
        for t in range(self.TOKENS):
            state = state * decay[t].exp()[:, None, None]
            u = beta[t][:, None] * (v[t] - torch.einsum("hvk,hk->hv", state, k[t]))
            state = state + u[:, :, None] * k[t][:, None, :]
            out.append(torch.einsum("hvk,hk->hv", state, q[t]) / self.D**0.5)
        return torch.stack(out)


def recurrences() -> None:
    net, every = Delta(), slice(0, Delta.TOKENS)
    held = net.states()
    want = net.run(held, [every], [0, net.TOKENS], [2], [1])
    last = [t[2].clone() for t in held]
    report("delta", close(want.flatten(1), net.exact().flatten(1), torch.float16))
    for cuts in ([1], [2, 3], [7], [*range(1, net.TOKENS)]):
        held, got = net.states(), []
        for start, end in zip([0, *cuts], [*cuts, net.TOKENS], strict=True):
            got.append(net.run(held, [slice(start, end)], [0, end - start], [3], [int(start == 0)]))
        same = torch.equal(torch.cat(got), want) and all(torch.equal(t[3], kept) for t, kept in zip(held, last))
        report(f"delta cut into {len(cuts) + 1}", "" if same else "bits differ")
    held = net.states()
    net.run(held, [slice(0, net.TOKENS - 1)], [0, net.TOKENS - 1], [1], [1])
    rows = [slice(net.TOKENS - 1, net.TOKENS), every]
    got = net.run(held, rows, [0, 1, 1 + net.TOKENS, 1 + net.TOKENS], [1, 4, 0], [0, 1, 0])  # the last is padding
    report("delta decoded beside a prompt", "" if torch.equal(got, torch.cat([want[-1:], want])) else "bits differ")
    kept = all(torch.equal(t[slot], was) for t, was in zip(held, last) for slot in (1, 4))
    report("delta states beside others", "" if kept else "bits differ")
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


if __name__ == "__main__":
    recurrences()
