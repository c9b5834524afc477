"""Bits, accuracy and times of the kernels of Kimi delta attention on a GPU, beside vLLM's kernels, in one process.

    PYTHONPATH=. python3 benchmarks/hopper/kda_times.py OUT.json [STEP ...]   # vLLM 0.33, a Hopper GPU

A layer is the convolution and the recurrence, with the 32 heads of Kimi-Linear-48B-A3B. Times are microseconds of a
layer: the median of 30 calls with the L2 cache flushed, decodes as CUDA graphs. vLLM's kernels are those of its layer
of Kimi Linear (Triton).
"""

import sys
from types import SimpleNamespace
from unittest import mock

import steps
import torch
from recurrent_times import DEVICE, error, ints, spans
from steps import graphed, timed

from bi_patch.kernels.cuda import causal_conv, kda

HEADS, SIZE = 32, kda.SIZE
CHANNELS = 3 * HEADS * SIZE
CONV = causal_conv.Form(CHANNELS, kda.WIDTH, False, True)
ROWS = (1, 2, 4)  # of a state, of a thread


class Layer:
    """A layer with random parameters and `slots` states. Inputs: x [tokens, channels], gate and beta."""

    def __init__(self, slots):
        gen = torch.Generator(DEVICE).manual_seed(3)
        rand = lambda *shape: torch.randn(*shape, generator=gen, device=DEVICE)  # noqa: E731
        self.weight, self.rate, self.dt_bias = rand(CHANNELS, kda.WIDTH) * 0.5, rand(HEADS), rand(HEADS * SIZE) - 3
        self.conv = torch.zeros(slots + 1, kda.WIDTH - 1, CHANNELS, device=DEVICE, dtype=torch.bfloat16)
        self.states = torch.zeros(slots + 1, HEADS, SIZE, SIZE, device=DEVICE)

    def make(self, tokens, seed=0):
        gen = torch.Generator(DEVICE).manual_seed(seed)
        rand = lambda *shape: torch.randn(*shape, generator=gen, device=DEVICE).to(torch.bfloat16)  # noqa: E731
        return rand(tokens, CHANNELS), rand(tokens, HEADS * SIZE), rand(tokens, HEADS)

    def ours(self, x, gate, beta, slots, starts=None, fresh=None, which=None):
        out = torch.empty(len(x), HEADS, SIZE, dtype=x.dtype, device=DEVICE)
        y = causal_conv.run(CONV, x, self.weight, None, self.conv, slots, starts, fresh, which)
        kda.run(out, y, gate, beta, self.rate, self.dt_bias, self.states, slots, starts, fresh)
        return out

    def step(self, *requests):
        """Outputs of requests (slot, fresh, (x, gate, beta)) in one step of prompts."""
        slots, fresh, inputs = zip(*requests, strict=True)
        sizes = [len(i[0]) for i in inputs]
        return self.ours(*map(torch.cat, zip(*inputs, strict=True)), ints(slots), *spans(sizes, fresh)).split(sizes)

    def _given(self, gate, beta):
        named = {"raw_g": gate.view(1, -1, HEADS, SIZE), "raw_beta": beta[None]}
        return named | {"A_log": self.rate, "lower_bound": None}

    def stock_decode(self, x, gate, beta, slots):
        from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update
        from vllm.models.kimi_k3.nvidia.ops.third_party.kda import fused_recurrent_kda_packed_decode

        y = causal_conv1d_update(
            x,
            self.conv.transpose(-1, -2),
            self.weight,
            None,
            "silu",
            conv_state_indices=slots,
            out=torch.empty_like(x),
        )
        more = {"dt_bias": self.dt_bias, "initial_state": self.states, "state_indices": slots}
        return fused_recurrent_kda_packed_decode(mixed_qkv=y, **self._given(gate, beta), **more)[0][0]

    def stock_prefill(self, x, gate, beta, slots, lengths):
        """A call of vLLM's kernels on prompts from position 0, with its metadata made beforehand."""
        from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn
        from vllm.models.kimi_k3.nvidia.ops.third_party.kda import chunk_kda_with_fused_gate
        from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

        host = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        starts, held = host.to(DEVICE), torch.zeros(len(lengths), dtype=torch.bool, device=DEVICE)
        names = "nums_dict", "batch_ptr", "token_chunk_offset_ptr"
        meta = SimpleNamespace(**dict(zip(names, compute_causal_conv1d_metadata(host, device=DEVICE), strict=True)))
        kept, each = self.conv.transpose(-1, -2), CHANNELS // 3

        def run():
            parts = []
            for at in range(0, CHANNELS, each):
                some = slice(at, at + each)
                y = causal_conv1d_fn(
                    x[:, some].transpose(0, 1),
                    self.weight[some],
                    None,
                    activation="silu",
                    conv_states=kept[:, some],
                    has_initial_state=held,
                    cache_indices=slots,
                    query_start_loc=starts,
                    metadata=meta,
                )
                parts.append(y.transpose(0, 1).view(1, -1, HEADS, SIZE))
            state = torch.zeros(len(lengths), HEADS, SIZE, SIZE, device=DEVICE)
            out, end = chunk_kda_with_fused_gate(
                *parts,
                **self._given(gate, beta),
                g_bias=self.dt_bias,
                initial_state=state,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
                cu_seqlens=starts,
            )
            self.states[slots] = end
            return out[0]

        return run

    def exact(self, x, gate, beta):
        """A request at position 0: fp64, but for the rounding of the convolution's outputs to bf16."""
        padded = torch.cat([torch.zeros(kda.WIDTH - 1, CHANNELS, device=DEVICE), x.float()]).double()
        y = sum(padded[i : i + len(x)] * self.weight[:, i].double() for i in range(kda.WIDTH))
        q, k, v = torch.nn.functional.silu(y).to(x.dtype).double().view(-1, 3, HEADS, SIZE).unbind(1)
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        step = torch.nn.functional.softplus(gate.double() + self.dt_bias.double()).view(-1, HEADS, SIZE)
        decay = (-self.rate.double().exp()[:, None] * step).exp()
        state, out = torch.zeros(HEADS, SIZE, SIZE, dtype=torch.float64, device=DEVICE), []
        for t in range(len(x)):
            state = state * decay[t][:, None]
            w = beta[t].double().sigmoid()[:, None] * (v[t] - torch.einsum("hvk,hk->hv", state, k[t]))
            state = state + torch.einsum("hv,hk->hvk", w, k[t])
            out.append(torch.einsum("hvk,hk->hv", state, q[t]) * SIZE**-0.5)
        return torch.stack(out)


def tile(rows):
    """In this context, every step takes so many rows of a thread."""
    return mock.patch.object(kda, "choose", lambda heads, requests: kda.Form(heads, rows))


def bits():
    """Tokens that differ, and whether the state is the same, by cuts, company, tiles and decode."""
    layer, total = Layer(16), 333
    x = layer.make(total)
    (want,) = layer.step((1, 1, x))
    state, inputs = layer.states[1].clone(), layer.conv[1].clone()
    differ = lambda got: int((got != want).any(-1).any(-1).sum())  # noqa: E731
    same = lambda slot: bool(torch.equal(layer.states[slot], state) and torch.equal(layer.conv[slot], inputs))  # noqa: E731
    cut = lambda first, last: tuple(t[first:last] for t in x)  # noqa: E731
    out = {}
    for at in (1, 2, 8, 64, 100, 332):
        first, second = layer.step((2, 1, cut(0, at)))[0], layer.step((2, 0, cut(at, total)))[0]
        out[f"cut at {at}"] = [differ(torch.cat([first, second])), same(2)]
    others = [layer.make(n, n) for n in (1, 17, 64, 500)]
    got = layer.step((3, 1, others[0]), (4, 1, others[1]), (2, 1, x), (5, 1, others[2]), (6, 1, others[3]))[2]
    out["company"] = [differ(got), same(2)]
    for rows in ROWS:
        with tile(rows):
            out[f"{rows} rows"] = [differ(layer.step((2, 1, x))[0]), same(2)]
    rows = list(layer.step((2, 1, cut(0, 200))))
    for t in range(200, total):
        n = 1 + t % 4
        beside = [o[t % 5 : t % 5 + n] for o in others[1]]
        packed = [torch.cat(pair) for pair in zip(cut(t, t + 1), beside, strict=True)]
        with tile(ROWS[t % len(ROWS)]):
            rows.append(layer.ours(*packed, ints([2, 7, 8, 9, 10][: n + 1]))[:1])
    out["decode from 200, in all tiles"] = [differ(torch.cat(rows)), same(2)]
    graph_x, slots = layer.make(3, 9), ints([3, 4, 5])
    before = layer.states.clone(), layer.conv.clone()
    wanted = layer.ours(*graph_x, slots)
    ended = layer.states.clone()
    held = {}
    replay = graphed(lambda: held.update(out=layer.ours(*graph_x, slots)))
    layer.states.copy_(before[0])
    layer.conv.copy_(before[1])
    replay()
    out["a CUDA graph"] = [int((held["out"] != wanted).sum()), bool(torch.equal(layer.states, ended))]
    return out


def errors():
    """Errors of a request against fp64: ours, and vLLM's of prefill and of decode."""
    layer, total = Layer(1), 333
    x = layer.make(total)
    exact = layer.exact(*x)
    out = {"ours": error(layer.step((1, 1, x))[0], exact)}
    out["vLLM, prefill"] = error(layer.stock_prefill(*x, ints([1]), [total])(), exact)
    layer.states.zero_()
    layer.conv.zero_()
    rows = [layer.stock_decode(*(p[t : t + 1] for p in x), ints([1])).clone() for t in range(total)]
    return out | {"vLLM, decode": error(torch.cat(rows), exact)}


def tried(run):
    """Times with each of the tiles, with the one that is chosen, and of the convolution alone."""
    out = {}
    for rows in ROWS:
        with tile(rows):
            out[f"{rows} rows"] = run()
    with mock.patch.object(kda, "load", lambda *_: lambda *_: None):
        out["ours, the convolution alone"] = run()
    return out | {"ours": run()}


def decode_times(n):
    layer = Layer(n)
    x, slots = layer.make(n), ints(range(1, n + 1))
    out = {"vLLM": timed(graphed(lambda: layer.stock_decode(*x, slots)))}
    return out | tried(lambda: timed(graphed(lambda: layer.ours(*x, slots))))


def prefill_times(lengths):
    layer = Layer(len(lengths))
    x, slots, more = layer.make(sum(lengths)), ints(range(1, len(lengths) + 1)), spans(lengths, [1] * len(lengths))
    times = 10 if sum(lengths) < 32000 else 3
    out = {"vLLM": timed(layer.stock_prefill(*x, slots, lengths), times)}
    return out | tried(lambda: timed(lambda: layer.ours(*x, slots, *more), times))


STEPS = {"bits": bits, "errors": errors}
STEPS |= {f"decode {n}": (lambda n=n: decode_times(n)) for n in (1, 8, 64, 256)}
for _l in ([512], [2048], [8192], [1024] * 8, [128] * 64, [32000] * 2):
    STEPS[f"prefill {len(_l)} x {_l[0]}"] = lambda held=_l: prefill_times(held)


def main() -> None:
    path, only = sys.argv[1], sys.argv[2:]
    steps.run(STEPS, steps.named(STEPS, only), path)


if __name__ == "__main__":
    main()
