"""Bits, accuracy and times of the kernels of recurrent layers on a GPU, beside vLLM's kernels, in one process.

    PYTHONPATH=. python3 benchmarks/hopper/recurrent_times.py OUT.json [STEP ...]   # vLLM 0.33, a Hopper GPU

A layer is the convolution and the recurrence, with the heads of Qwen3-Next-80B-A3B, Granite 4-H small and Falcon-H1
7B. Times are microseconds of a layer: the median of 30 calls with the L2 cache flushed, decodes as CUDA graphs, ours
over whole chunks, on average. vLLM's prefill is its Triton backend (FLA) for gated delta nets, with FLASHINFER=1 also
FlashInfer, and its SSD kernels for Mamba 2.
"""

import multiprocessing
import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import steps
import torch
from steps import graphed, timed

from bi_patch.kernels.cuda import recurrent

DEVICE = "cuda"
FORMS = {
    "Qwen3-Next": recurrent.Form(False, 128, 128, 16, 32, (True, False, False)),
    "Granite 4-H": recurrent.Form(True, 128, 64, 1, 128, (True, False, False)),
    "Falcon-H1": recurrent.Form(True, 256, 128, 1, 24, (True, False, False)),
}
CHUNK = 256  # of vLLM's Mamba 2
TILES = tuple(map(int, os.environ.get("TILES", "1,2,4,8").split(",")))  # warps of a block
FLASHINFER = bool(os.environ.get("FLASHINFER"))  # time it, too: it compiles its kernels for minutes


class Layer:
    """A layer with random parameters and `slots` states."""

    def __init__(self, form, slots):
        gen = torch.Generator(DEVICE).manual_seed(3)
        rand = lambda *shape: torch.randn(*shape, generator=gen, device=DEVICE)  # noqa: E731
        self.form, bf16 = form, torch.bfloat16
        self.weight = (rand(form.channels, 4) * 0.5).to(bf16)
        self.bias = rand(form.channels).to(bf16) * 0.1 if form.mamba else None
        self.rate = -(rand(form.heads).exp()) if form.mamba else rand(form.heads)
        self.dt_bias = (rand(form.heads) - 1).to(bf16)
        self.skip = rand(form.heads).to(bf16) if form.mamba else None
        self.conv = torch.zeros(slots + 1, form.kept, form.channels, device=DEVICE, dtype=bf16)
        self.states = torch.zeros(slots + 1, form.heads, form.values, form.keys, device=DEVICE)

    def make(self, tokens, seed=0):
        gen = torch.Generator(DEVICE).manual_seed(seed)
        rand = lambda *shape: torch.randn(*shape, generator=gen, device=DEVICE).to(torch.bfloat16)  # noqa: E731
        return rand(tokens, self.form.channels), rand(tokens, self.form.heads), rand(tokens, self.form.heads)

    def ours(self, x, a, b, slots, starts=None, fresh=None, which=None, segments=None, form=None):
        out = torch.empty(len(x), self.form.heads, self.form.values, dtype=x.dtype, device=DEVICE)
        recurrent.run(
            form or self.form, out, x, self.weight, self.bias, a, None if self.form.mamba else b, self.rate,
            self.dt_bias, self.skip, self.conv, self.states, slots, starts, fresh, which, segments,
        )  # fmt: skip
        return out

    def step(self, *requests, form=None):
        """Outputs of requests (slot, fresh, (x, a, b)) in one step of prompts."""
        slots, fresh, inputs = zip(*requests, strict=True)
        sizes = [len(i[0]) for i in inputs]
        more = spans(sizes, fresh)
        packed = [torch.cat(t) for t in zip(*inputs, strict=True)]
        return self.ours(*packed, ints(slots), *more, form=form).split(sizes)

    def stock_decode(self, x, a, b, slots):
        from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update

        f = self.form
        y = causal_conv1d_update(
            x, self.conv[:, :3].transpose(-1, -2), self.weight, self.bias, "silu", conv_state_indices=slots
        )
        out = torch.empty(len(x), 1, f.heads, f.values, dtype=x.dtype, device=DEVICE)
        if f.mamba:
            from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update

            sizes = [f.heads * f.values, f.key_heads * f.keys, f.key_heads * f.keys]
            v, k, q = y.split(sizes, -1)
            wide = lambda t: t[:, None].expand(-1, f.values)  # noqa: E731
            selective_state_update(
                self.states, v.view(-1, f.heads, f.values), a[:, :, None].expand(-1, -1, f.values),
                self.rate[:, None, None].expand(-1, f.values, f.keys), k.view(-1, f.key_heads, f.keys),
                q.view(-1, f.key_heads, f.keys), wide(self.skip), wide(self.dt_bias), dt_softplus=True,
                state_batch_indices=slots[:, None], dst_state_batch_indices=slots[:, None], out=out[:, 0],
            )  # fmt: skip
        else:
            from vllm.third_party.flash_linear_attention.ops import fused_recurrent_gated_delta_rule_packed_decode

            fused_recurrent_gated_delta_rule_packed_decode(
                y, a, b, self.rate, self.dt_bias, f.keys**-0.5, self.states, out, slots, use_qk_l2norm_in_kernel=True
            )
        return out[:, 0]

    def stock_prefill(self, x, a, b, slots, lengths, flashinfer=False):
        """A call of vLLM's kernels on prompts from position 0, with its metadata made beforehand."""
        from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn
        from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

        f = self.form
        starts_cpu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        starts, held = starts_cpu.to(DEVICE), torch.zeros(len(lengths), dtype=torch.bool, device=DEVICE)

        class Meta:
            nums_dict, batch_ptr, token_chunk_offset_ptr = compute_causal_conv1d_metadata(starts_cpu, device=DEVICE)

        kept = self.conv[:, :3].transpose(-1, -2)

        def convolve():
            return causal_conv1d_fn(
                x.transpose(0, 1), self.weight, self.bias, activation="silu", conv_states=kept,
                has_initial_state=held, cache_indices=slots, query_start_loc=starts, metadata=Meta,
            ).transpose(0, 1)  # fmt: skip

        if f.mamba:
            from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen

            edges, which, last = [0], [], []
            for r, n in enumerate(lengths):
                for p in range(0, n, CHUNK):
                    edges.append(edges[-1] + min(CHUNK, n - p))
                    which.append(r)
                last.append(len(which) - 1)
            edges, which, last = ints(edges), ints(which), ints(last)
            out = torch.empty(len(x), f.heads, f.values, dtype=x.dtype, device=DEVICE)

            def run():
                v, k, q = convolve().split([f.heads * f.values, f.key_heads * f.keys, f.key_heads * f.keys], -1)
                mamba_chunk_scan_combined_varlen(
                    v.view(len(x), f.heads, f.values), a, self.rate, k.view(len(x), f.key_heads, -1),
                    q.view(len(x), f.key_heads, -1), chunk_size=CHUNK, D=self.skip, z=None, dt_bias=self.dt_bias,
                    seq_idx=which, cu_seqlens=starts, cu_chunk_seqlens=edges, last_chunk_indices=last,
                    initial_states=None, dt_softplus=True, dt_limit=(0.0, float("inf")), out=out,
                    state_dtype=torch.float32, final_states_out=self.states, final_state_indices=slots,
                )  # fmt: skip
                return out

            return run
        from vllm.third_party.flash_linear_attention.ops import chunk_gated_delta_rule, fused_post_conv_prep
        from vllm.third_party.flash_linear_attention.ops.index import prepare_chunk_indices, prepare_chunk_offsets

        chunks = [make(starts_cpu, 64).to(DEVICE) for make in (prepare_chunk_indices, prepare_chunk_offsets)]

        def run():
            q, k, v, g, beta = fused_post_conv_prep(
                conv_output=convolve(), a=a, b=b, A_log=self.rate, dt_bias=self.dt_bias, num_k_heads=f.key_heads,
                head_k_dim=f.keys, head_v_dim=f.values, apply_l2norm=True, output_g_exp=False,
            )  # fmt: skip
            state = self.states[slots]
            state[~held, ...] = 0
            if flashinfer:
                from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import fi_chunk_gated_delta_rule

                o, self.states[slots] = fi_chunk_gated_delta_rule(
                    q[None], k[None], v[None], g[None], beta[None], state, True, starts, False
                )
                return o[0]
            o, end = chunk_gated_delta_rule(
                q=q[None], k=k[None], v=v[None], g=g[None], beta=beta[None], initial_state=state,
                output_final_state=True, cu_seqlens=starts, chunk_indices=chunks[0], chunk_offsets=chunks[1],
                use_qk_l2norm_in_kernel=False,
            )  # fmt: skip
            self.states[slots] = end
            return o[0]

        return run

    def exact(self, x, a, b):
        """A request at position 0: fp64, but for the rounding of the convolution's outputs to bf16."""
        f = self.form
        padded = torch.cat([torch.zeros(3, f.channels, device=DEVICE), x.float()]).double()
        y = sum(padded[i : i + len(x)] * self.weight[:, i].double() for i in range(4))
        y = torch.nn.functional.silu(y + (0 if self.bias is None else self.bias.double())).to(x.dtype).double()
        sizes = [f.key_heads * f.keys] * 2 + [f.heads * f.values]
        q, k, v = y.split(sizes, 1) if not f.mamba else y.split(sizes[::-1], 1)[::-1]
        q, k, v = q.view(len(x), -1, f.keys), k.view(len(x), -1, f.keys), v.view(len(x), -1, f.values)
        q, k = (t.repeat_interleave(f.heads // f.key_heads, 1) for t in (q, k))
        step = torch.nn.functional.softplus(a.double() + self.dt_bias.double())
        decay = (step * (self.rate.double() if f.mamba else -self.rate.double().exp())).exp()
        if not f.mamba:
            q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
            q, step = q * f.keys**-0.5, b.double().sigmoid()
        state, out = torch.zeros(f.heads, f.values, f.keys, dtype=torch.float64, device=DEVICE), []
        for t in range(len(x)):
            state = decay[t][:, None, None] * state
            w = v[t] if f.mamba else v[t] - torch.einsum("hvk,hk->hv", state, k[t])
            state = state + torch.einsum("hv,hk->hvk", step[t][:, None] * w, k[t])
            out.append(torch.einsum("hvk,hk->hv", state, q[t]))
        out = torch.stack(out)
        return out + self.skip.double()[:, None] * v if f.mamba else out


def ints(held):
    return torch.tensor(held, dtype=torch.int32, device=DEVICE)


def spans(sizes, fresh):
    which = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(torch.int32).to(DEVICE)
    return ints([0, *sizes]).cumsum(0).to(torch.int32), torch.tensor(fresh, dtype=torch.int8, device=DEVICE), which


def error(got, want):
    """Mean and greatest difference, over the greatest value."""
    off = (got.double() - want).abs() / want.abs().max()
    return {"mean": float(off.mean()), "max": float(off.max())}


def forms(form):
    """The tiles that are tried."""
    return [form._replace(warps=n) for n in TILES if form.values % (16 * n) == 0]


def label(form):
    return f"{form.warps} warps"


def bits(name):
    """Differences that cuts, company, tiles and decode make."""
    layer, total = Layer(FORMS[name], 16), 333
    x = layer.make(total)
    (want,) = layer.step((1, 1, x))
    state, inputs = layer.states[1].clone(), layer.conv[1, :3].clone()
    differ = lambda got: int((got != want).any(-1).any(-1).sum())  # noqa: E731
    same = lambda slot: bool(torch.equal(layer.states[slot], state) and torch.equal(layer.conv[slot, :3], inputs))  # noqa: E731
    cut = lambda first, last: tuple(t[first:last] for t in x)  # noqa: E731
    out = {}
    for at in (1, 2, 8, 64, 100, 256):
        first, second = layer.step((2, 1, cut(0, at)))[0], layer.step((2, 0, cut(at, total)))[0]
        out[f"cut at {at}"] = [differ(torch.cat([first, second])), same(2)]
    others = [layer.make(n, n) for n in (1, 17, 64, 500)]
    got = layer.step((3, 1, others[0]), (4, 1, others[1]), (2, 1, x), (5, 1, others[2]), (6, 1, others[3]))[2]
    out["company"] = [differ(got), same(2)]
    if layer.form.mamba:
        short = layer.form._replace(segment=64)
        starts, *more = spans([1, total - 100], [0, 0])
        for warps in TILES:
            layer.step((2, 1, cut(0, 100)))
            packed = [torch.cat(pair) for pair in zip(layer.make(1), cut(100, total), strict=True)]
            segments = recurrent.cut(starts, total - 99, 1, 64)
            with mock.patch.object(recurrent, "choose", lambda f, n, warps=warps: f._replace(warps=warps)):
                got = layer.ours(*packed, ints([11, 2]), starts, *more, segments, form=short)
            out[f"in segments, {warps} warps"] = [int((got[1:] != want[100:]).any(-1).any(-1).sum()), same(2)]
    tiles = forms(layer.form)
    for form in tiles:
        with mock.patch.object(recurrent, "choose", lambda f, n, form=form: form):
            try:
                out[label(form)] = [differ(layer.step((2, 1, x))[0]), same(2)]
            except Exception as e:
                out[label(form)] = repr(e)[:300]
    rows = list(layer.step((2, 1, cut(0, 200))))
    for t in range(200, total):
        n = 1 + t % 4
        beside = [o[t % 5 : t % 5 + n] for o in others[1]]
        packed = [torch.cat(pair) for pair in zip(cut(t, t + 1), beside, strict=True)]
        form = tiles[t % len(tiles)]
        with mock.patch.object(recurrent, "choose", lambda f, n, form=form: form):
            rows.append(layer.ours(*packed, ints([2, 7, 8, 9, 10][: n + 1]))[:1])
    out["decode from 200, in all tiles"] = [differ(torch.cat(rows)), same(2)]
    return out


def errors(name):
    """Errors of a request against fp64: ours, and vLLM's of prefill and of decode."""
    layer, total = Layer(FORMS[name], 1), 333
    x = layer.make(total)
    cut = lambda first, last: tuple(t[first:last] for t in x)  # noqa: E731
    exact = layer.exact(*x)
    out = {"ours": error(layer.step((1, 1, x))[0], exact)}
    out["vLLM, prefill"] = error(layer.stock_prefill(*x, ints([1]), [total])(), exact)
    rows = [layer.stock_prefill(*cut(0, 1), ints([1]), [1])()]
    rows += [layer.stock_decode(*cut(t, t + 1), ints([1])).clone() for t in range(1, total)]
    return out | {"vLLM, decode": error(torch.cat(rows), exact)}


def warm(name):
    """Compile and tune vLLM's kernels (TRITON_CACHE_AUTOTUNING=1 keeps the choices for the next process)."""
    layer = Layer(FORMS[name], 2)
    x = layer.make(64)
    layer.stock_prefill(*x, ints([1]), [64])()
    layer.stock_decode(*(t[:2] for t in x), ints([1, 2]))
    torch.cuda.synchronize()
    return {}


def tried(layer, run, forms):
    """Times with each of the tiles, with the one that is chosen, and without the recurrence."""
    out = {}
    for form in forms:
        with mock.patch.object(recurrent, "choose", lambda f, n, form=form: form):
            try:
                out[label(form)] = run()
            except Exception as e:
                out[label(form)] = repr(e)[:300]
    load = recurrent.load

    def nothing(form, kernel, device):
        return load(form, kernel, device) if kernel in ("prepare", "keep_inputs") else lambda *_: None

    with mock.patch.object(recurrent, "load", nothing):
        out["ours, without the recurrence"] = run()
    out["ours"] = run()
    return out


def decode_times(name, n):
    layer = Layer(FORMS[name], n)
    x, slots = layer.make(n), ints(range(1, n + 1))
    out = {"vLLM": timed(graphed(lambda: layer.stock_decode(*x, slots)))}
    out |= tried(layer, lambda: timed(graphed(lambda: layer.ours(*x, slots)), 32, mean=True), forms(layer.form))
    state, token = layer.states[0].numel() * 4, (layer.conv.shape[1] - 3) * layer.form.channels * 2 // 7
    out["bytes of states and logs, read and written on average"] = n * (
        state * 9 // 8 + token * 7 // 2 + token * 7 // 8
    )
    return out


def prefill_times(name, lengths):
    layer = Layer(FORMS[name], len(lengths))
    x, slots = layer.make(sum(lengths)), ints(range(1, len(lengths) + 1))
    more = spans(lengths, [1] * len(lengths))
    out, times = {}, 10 if sum(lengths) < 32000 else 3
    try:
        out["vLLM"] = timed(layer.stock_prefill(*x, slots, lengths), times)
    except Exception:
        out["vLLM"] = traceback.format_exc()[-600:]
    if not layer.form.mamba and FLASHINFER:
        try:
            out["vLLM, FlashInfer"] = timed(layer.stock_prefill(*x, slots, lengths, True), times)
        except Exception:
            out["vLLM, FlashInfer"] = traceback.format_exc()[-300:]
    held = recurrent.cut(more[0], len(x[0]), len(lengths)) if layer.form.mamba else None
    out |= tried(layer, lambda: timed(lambda: layer.ours(*x, slots, *more, held), times), forms(layer.form))
    if held is not None:
        for said, limit in (("in segments", 1 << 30), ("without segments", 0)):
            with mock.patch.object(recurrent, "_HELD", limit):
                out[said] = timed(lambda: layer.ours(*x, slots, *more, held), times)
    return out


def build(wanted):
    """Compile the kernels of the forms."""
    jobs = [
        (f, kernel)
        for form in wanted
        for f in forms(form)
        for kernel in ("scan", "scan_one", "follow")[: 2 + form.mamba]
    ]
    jobs += [(recurrent.tiles(form)[0], kernel) for form in wanted for kernel in ("prepare", "keep_inputs")]
    # Processes: NVRTC compiles one kernel of a process after the other. They start before this one uses the GPU.
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        cubins = dict(zip(jobs, pool.map(_compiled, jobs), strict=True))
    own = recurrent.build
    recurrent.build = lambda form, kernel, arch, major: cubins.get((form, kernel)) or own(form, kernel, arch, major)


def _compiled(job):
    try:
        return recurrent.build(*job, "sm_90", int(str(torch.version.cuda or 13).split(".")[0]))
    except Exception:  # the step says it
        return None


STEPS = {f"warm {name}": (lambda name=name: warm(name)) for name in FORMS}
STEPS |= {f"bits {name}": (lambda name=name: bits(name)) for name in FORMS}
STEPS |= {f"errors {name}": (lambda name=name: errors(name)) for name in FORMS}
for _n in (1, 8, 64, 256):
    STEPS |= {f"decode {name} {_n}": (lambda name=name, n=_n: decode_times(name, n)) for name in FORMS}
for _l in ([8192], [1024] * 8, [32000] * 2, [512], [2048], [128] * 64):
    title = f"{len(_l)} x {_l[0]}"
    STEPS |= {f"prefill {name} {title}": (lambda name=name, held=_l: prefill_times(name, held)) for name in FORMS}


STEPS_OF_ALL = ("bits", "errors", "decode", "prefill")  # parts of the names of steps of each form


def main() -> None:
    path, only = sys.argv[1], sys.argv[2:]
    if not any("warm" in part for part in only):
        build(
            [
                form
                for name, form in FORMS.items()
                if not only or any(name in part or part in STEPS_OF_ALL for part in only)
            ]
        )
    steps.run(STEPS, steps.named(STEPS, only), path)


if __name__ == "__main__":
    main()
