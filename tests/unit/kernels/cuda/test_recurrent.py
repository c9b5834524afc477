"""The kernels of recurrent layers on the CPU, compared with fp64: g++ compiles them over emulated instructions."""

import ctypes
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bi_patch.kernels.cuda import nvrtc, recurrent

KERNELS = Path(__file__).resolve().parents[4] / "kernels" / "cuda"
LAUNCH = {
    "prepare": "const u16* x, const u16* w, const u16* bias, u16* conv, const u16* a, const u16* b, const void* rate, "
    "const void* dt, u16* y, float* keyed, float* valued, const int* starts, const int* slots, const signed char* "
    "fresh, const int* which, i64 conv_slot, int tokens, int requests, int per, int x_row, int conv_row, int a_row, "
    "int b_row, int* counts",
    "keep_inputs": "const u16* x, u16* conv, const u16* y, const float* keyed, const float* valued, const int* starts, "
    "const int* slots, const signed char* fresh, i64 conv_slot, int x_row, int conv_row, const int* counts",
    "follow": "const u16* y, const float* valued, float* states, const int* starts, const int* slots, const signed "
    "char* fresh, i64 state_slot, u16* conv, i64 conv_slot, const int* counts, const int* firsts, float* starting",
    "scan": "const u16* y, const float* keyed, const float* valued, const void* d, float* states, u16* out, const int* "
    "starts, const int* slots, const signed char* fresh, i64 state_slot, u16* conv, i64 conv_slot, const int* counts, "
    "const int* segments, const float* starting",
    "scan_one": "const u16* y, const float* keyed, const float* valued, const void* d, float* states, u16* out, const "
    "int* slots, i64 state_slot, u16* conv, i64 conv_slot, const int* counts",
}


def build(folder: Path, form: recurrent.Form, threads: int) -> ctypes.CDLL:
    """The kernels for the CPU: each kernel's name, with the grid before the kernel's arguments."""
    text = f'#include "emulate.h"\n#include "{KERNELS / "recurrent.cu"}"\n'
    for kernel, parameters in LAUNCH.items():
        names = ", ".join(part.replace("*", " ").split()[-1] for part in parameters.split(","))
        text += (
            f'extern "C" void run_{kernel}(int blocks_x, int blocks_y, {parameters}) {{\n'
            f"  run_grid(blocks_x, blocks_y, THREADS, [&] {{ {kernel}({names}); }});\n}}\n"
        )
    source = folder / f"recurrent-{abs(hash(form))}-{threads}.cpp"
    sizes = 'extern "C" int bytes_of_scan() { return sizeof(Memory); }\n'
    source.write_text(text + sizes + 'extern "C" int bytes_of_follow() { return sizeof(Followed); }\n')
    library = source.with_suffix(".so")
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas"]
    command += [f"-I{Path(__file__).parent}", str(source), "-o", str(library)]
    command += [
        f"-D{name}={value}" for name, value in (form.defines("scan") | {"THREADS": threads}).items() if name != "ONLY"
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def emulated(tmp_path, monkeypatch):
    built = {}

    def load(form, kernel, device):
        key = form, form.threads(kernel)
        if key not in built:
            built[key] = build(tmp_path, *key)
            for name in ("scan", "follow"):
                assert getattr(built[key], f"bytes_of_{name}")() == form.shared_bytes(name)
        return lambda grid, stream, arguments: getattr(built[key], f"run_{kernel}")(*grid, *arguments)

    monkeypatch.setattr(recurrent, "load", load)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))


class Layer:
    """A layer with random parameters, and its states in `slots` slots."""

    def __init__(self, mamba: bool, slots: int = 4, **given):
        sizes = {"keys": 64, "values": 64, "key_heads": 1, "heads": 2, "floats": (True, False, False)}
        self.form = recurrent.Form(mamba, **sizes | given)
        form, bf16 = self.form, torch.bfloat16
        torch.manual_seed(3)
        self.weight = torch.randn(form.channels, 4).to(bf16)
        self.bias = torch.randn(form.channels).to(bf16) if mamba else None
        self.rate = -torch.rand(form.heads).exp() if mamba else torch.randn(form.heads)
        self.dt_bias = torch.randn(form.heads).to(bf16)
        self.skip = torch.randn(form.heads).to(bf16) if mamba else None
        self.conv = torch.randn(slots, form.kept, form.channels).to(bf16)
        self.states = torch.randn(slots, form.heads, form.values, form.keys)

    def make(self, tokens: int, seed: int) -> list[torch.Tensor]:
        """x, a and b of a request. The rows of x are strided."""
        torch.manual_seed(seed)
        made = torch.randn(tokens, self.form.channels + 2), torch.randn(tokens, 2, 2)
        return [made[0].to(torch.bfloat16)[:, 2:], *made[1].to(torch.bfloat16).unbind(1)]

    def step(self, *requests, decode: bool = False, prompts: int = 0) -> list[torch.Tensor]:
        """The outputs of requests (slot, fresh, x, a, b). prompts: cut so many long ones into segments."""
        slots, fresh, *inputs = zip(*requests, strict=True)
        x, a, b = map(torch.cat, inputs)
        sizes = torch.tensor([0, *map(len, inputs[0])])
        out = torch.empty(len(x), self.form.heads, self.form.values, dtype=x.dtype)
        more = None, None, None
        if not decode:
            which = torch.repeat_interleave(torch.arange(len(slots)), sizes[1:]).to(torch.int32)
            more = sizes.cumsum(0).to(torch.int32), torch.tensor(fresh, dtype=torch.int8), which
            if prompts:
                segments = recurrent.cut(more[0], len(x), prompts, self.form.segment)
                assert segments is not None
                more = *more, segments
        numbers = self.weight, self.bias, a, None if self.form.mamba else b, self.rate, self.dt_bias, self.skip
        recurrent.run(
            self.form, out, x, *numbers, self.conv, self.states, torch.tensor(slots, dtype=torch.int32), *more
        )
        return list(out.split(sizes[1:].tolist()))

    def exact(self, x, a, b) -> torch.Tensor:
        """The same of a request at position 0, in fp64 after the convolution."""
        form = self.form
        padded = torch.cat([torch.zeros(3, form.channels), x.float()]).double()
        bias = 0 if self.bias is None else self.bias.double()
        y = sum(padded[i : i + len(x)] * self.weight[:, i].double() for i in range(4)) + bias
        y = torch.nn.functional.silu(y).to(torch.bfloat16).double()
        sizes = [form.key_heads * form.keys] * 2 + [form.heads * form.values]
        q, k, v = y.split(sizes, 1) if not form.mamba else y.split(sizes[::-1], 1)[::-1]
        q, k, v = (t.view(len(x), -1, 64) for t in (q, k, v))
        q, k = (t.repeat_interleave(form.heads // form.key_heads, 1) for t in (q, k))
        step = torch.nn.functional.softplus(a.double() + self.dt_bias.double())
        decay = (step * (self.rate.double() if form.mamba else -self.rate.double().exp())).exp()
        if not form.mamba:
            q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
            q, step = q * form.keys**-0.5, b.double().sigmoid()
        state, out = torch.zeros(form.heads, form.values, form.keys, dtype=torch.float64), []
        for t in range(len(x)):
            state = decay[t][:, None, None] * state
            w = v[t] if form.mamba else v[t] - torch.einsum("hvk,hk->hv", state, k[t])
            state = state + torch.einsum("hv,hk->hvk", step[t][:, None] * w, k[t])
            out.append(torch.einsum("hvk,hk->hv", state, q[t]))
        out = torch.stack(out)
        return out + self.skip.double()[:, None] * v if form.mamba else out


@pytest.mark.parametrize("mamba", [False, True])
def test_cuts_company_tiles_and_decodes_change_no_bit(emulated, monkeypatch, mamba):
    layer = Layer(mamba)
    tokens = layer.form.tile + 5
    x = layer.make(tokens, 1)
    (want,) = layer.step((1, 1, *x))
    state, kept = layer.states[1].clone(), layer.conv[1].clone()
    exact = layer.exact(*x)
    assert (want.double() - exact).abs().max() < 8e-3 * exact.abs().max()
    assert torch.equal(kept[:3], x[0][-3:])

    cut = lambda first, last: [t[first:last] for t in x]  # noqa: E731
    other, third = layer.make(5, 2), layer.make(3, 5)
    got = [layer.step((3, 1, *other), (2, 1, *cut(0, 5)))[1]]
    for t in range(5, 13):  # a decode fills a chunk; the state is written then only
        before = layer.states[2].clone()
        slot = 2 if t < 11 else 1
        if t == 11:  # as for a cached prefix
            layer.states[1], layer.conv[1] = layer.states[2], layer.conv[2]
        got += layer.step((slot, 0, *cut(t, t + 1)), (0, 0, *cut(0, 1)), decode=True)[:1]
        assert torch.equal(layer.states[2], before) == (t != 7)
    monkeypatch.setattr(recurrent, "choose", lambda form, _: recurrent.tiles(form)[1])
    got += layer.step((1, 0, *cut(13, tokens - 2)), (3, 0, *third))[:1]
    got += layer.step((2, 1, *cut(0, 1)), (1, 0, *cut(tokens - 2, tokens)))[1:]
    assert torch.equal(torch.cat(got), want)
    assert torch.equal(layer.states[1], state) and torch.equal(layer.conv[1, :3], kept[:3])
    (after,) = layer.step((3, 1, *(torch.cat(pair) for pair in zip(other, third, strict=True))))
    assert torch.isfinite(after).all()


def test_segments_of_long_prompts_change_no_bit(emulated):
    # Two parts of a head's keys; a segment is what a block brings at once.
    layer = Layer(True, keys=128, heads=1, segment=32, part=64, ahead=32)
    x, other = layer.make(109, 1), layer.make(1, 2)
    cut = lambda first, last: [t[first:last] for t in x]  # noqa: E731
    (want,) = layer.step((1, 1, *x))
    layer.step((3, 1, *layer.make(2, 5)))
    layer.states[0], layer.conv[0] = layer.states[3], layer.conv[3]  # slot 0 is skipped
    first = layer.step((2, 1, *cut(0, 5)))
    (beside,) = layer.step((3, 0, *other))
    layer.states[3], layer.conv[3] = layer.states[0], layer.conv[0]
    got = layer.step((3, 0, *other), (2, 0, *cut(5, 106)), (0, 0, *other), prompts=1)
    last = layer.step((2, 0, *cut(106, 109)))
    assert torch.equal(torch.cat([*first, got[1], *last]), want) and torch.equal(got[0], beside)
    assert torch.equal(layer.states[2], layer.states[1]) and torch.equal(layer.conv[2, :3], layer.conv[1, :3])
    (again,) = layer.step((2, 1, *x), prompts=1)  # from position 0, in a slot that holds something
    assert torch.equal(again, want) and torch.equal(layer.states[2], layer.states[1])


def test_each_token_of_a_long_prompt_is_in_one_segment():
    starts = torch.tensor([0, 1, 1000, 1000, 3000], dtype=torch.int32)
    segments = recurrent.cut(starts, 3000, 2)
    for request, tokens in enumerate(starts.diff().tolist()):
        numbers = [n for r, n in segments.table.tolist() if r == request]
        assert numbers == list(range(len(numbers))) and len(numbers) * recurrent.SEGMENT >= tokens + 7
        assert segments.table[segments.firsts[request]].tolist() == [request, 0]
    assert recurrent.cut(starts, 3000, 3) is None  # short on average


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    "form",
    [
        recurrent.Form(False, 128, 128, 16, 32, (True, False, False)),
        recurrent.Form(True, 128, 64, 1, 128, (True, False, False)),
        recurrent.Form(True, 256, 128, 1, 24, (True, True, True)),
    ],
)
def test_compiles_without_a_gpu(arch, form):
    few, many = recurrent.tiles(form)
    jobs = [(few, "prepare"), (few, "keep_inputs"), (few, "scan"), (few, "scan_one"), (many, "scan")]
    for job in (*jobs, *[(many, "follow")] * form.mamba):
        assert recurrent.build(*job, arch, 13)[:4] == b"\x7fELF"
        assert job[0].shared_bytes(job[1]) < 48 * 1024 and nvrtc


def test_many_requests_give_a_block_more_warps():
    form = recurrent.Form(False, 128, 128, 16, 32, (True, False, False))
    assert [recurrent.choose(form, n).warps for n in (1, 2, 8, 256)] == [2, 2, 4, 4]
