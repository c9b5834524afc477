"""On a GPU: a recurrent layer's bits depend on nothing but the request's own tokens, in prompts, decodes and graphs."""

import pytest
import torch

from bi_patch.kernels.cuda import causal_conv, mamba1, recurrent

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

FORMS = [
    recurrent.Form(False, 128, 128, 16, 32, (True, False, False)),
    recurrent.Form(True, 128, 64, 1, 128, (True, False, False)),
    recurrent.Form(True, 256, 128, 1, 24, (True, False, False)),
]
TOKENS = 333


def ints(*held):
    return torch.tensor(held, dtype=torch.int32, device="cuda")


class Layer:
    """A layer with random parameters and eight states, and one request's inputs."""

    def __init__(self, form):
        torch.manual_seed(5)
        rand = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()  # noqa: E731
        self.form, heads = form, form.heads
        rate = -rand(heads).float().exp() if form.mamba else rand(heads).float()
        self.parameters = rate, rand(heads), rand(heads) if form.mamba else None
        self.weight, self.bias = rand(form.channels, 4), rand(form.channels) if form.mamba else None
        self.conv = torch.zeros(9, form.kept, form.channels, device="cuda", dtype=torch.bfloat16)
        self.states = torch.zeros(9, heads, form.values, form.keys, device="cuda")
        self.inputs = rand(TOKENS, form.channels), rand(TOKENS, heads), rand(TOKENS, heads)

    def run(self, out, x, a, b, slots, *more):
        given = self.weight, self.bias, a, None if self.form.mamba else b, *self.parameters
        recurrent.run(self.form, out, x, *given, self.conv, self.states, slots, *more or (None, None, None))
        return out

    def step(self, *requests):
        """Outputs of requests (slot, first token, last token) of prompts that all have the same inputs."""
        sizes = [last - first for _, first, last in requests]
        x, a, b = (torch.cat([t[first:last] for _, first, last in requests]) for t in self.inputs)
        which = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(torch.int32).cuda()
        fresh = torch.tensor([first == 0 for _, first, _ in requests], dtype=torch.int8, device="cuda")
        out = torch.empty(len(x), self.form.heads, self.form.values, dtype=x.dtype, device="cuda")
        slots, starts = ints(*(slot for slot, *_ in requests)), ints(0, *sizes).cumsum(0).to(torch.int32)
        return self.run(out, x, a, b, slots, starts, fresh, which).split(sizes)


@pytest.mark.parametrize("form", FORMS, ids=["gated delta net", "Mamba 2", "Mamba 2, wide"])
def test_cuts_company_and_graphs(form):
    layer = Layer(form)
    (want,) = layer.step((1, 0, TOKENS))
    state = layer.states[1].clone()
    for cut in (1, 2, 8, 64, 100, 332):
        parts = layer.step((2, 0, cut)) + layer.step((2, cut, TOKENS))
        assert torch.equal(torch.cat(parts), want) and torch.equal(layer.states[2], state)
    beside = layer.step((3, 0, 1), (4, 0, 17), (2, 0, TOKENS), (5, 0, 64), (6, 0, 300))
    assert all(torch.equal(got, want[: len(got)]) for got in beside) and torch.equal(layer.states[2], state)
    # Decode requests at other positions by one graph; the last row is padding.
    layer.step((1, 0, 200), (2, 0, 17), (3, 0, 100))
    at = [200, 17, 100, 0]
    x, a, b = (t[at].contiguous() for t in layer.inputs)
    out = torch.empty(4, form.heads, form.values, dtype=x.dtype, device="cuda")
    slots = ints(1, 2, 3, 0)
    recurrent.prepare(form, torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.run(out, x, a, b, slots)
    for i in range(TOKENS - 200):
        for held, t in zip((x, a, b), layer.inputs, strict=True):
            held.copy_(t[[n + i for n in at[:3]] + [0]])
        graph.replay()
        assert all(torch.equal(out[row], want[n + i]) for row, n in enumerate(at[:3])) and not out[3].any()
    assert torch.equal(layer.states[1], state)  # of the last whole chunk


@pytest.mark.parametrize("form", FORMS[1:], ids=["Mamba 2", "Mamba 2, wide"])
def test_segments_of_a_long_prompt(form, monkeypatch):
    monkeypatch.setattr(recurrent, "_HELD", 1 << 30)
    layer = Layer(form._replace(segment=64))
    (want,) = layer.step((1, 0, TOKENS))
    for first in (0, 5, 13):
        if first:
            layer.step((2, 0, first), (3, 0, 7))
        x, a, b = (torch.cat([t[7:8], t[first:]]) for t in layer.inputs)
        starts = ints(0, 1, len(x))
        which = torch.tensor([0] + [1] * (len(x) - 1), dtype=torch.int32, device="cuda")
        fresh = torch.tensor([0, first == 0], dtype=torch.int8, device="cuda")
        segments = recurrent.cut(starts, len(x), 1, 64)
        assert segments is not None
        out = torch.empty(len(x), form.heads, form.values, dtype=x.dtype, device="cuda")
        got = layer.run(out, x, a, b, ints(3 if first else 0, 2), starts, fresh, which, segments)
        assert torch.equal(got[1:], want[first:]) and torch.equal(layer.states[2], layer.states[1])
        assert not first or torch.equal(got[0], want[7])


def test_cuts_and_decodes_of_short_convolutions():
    torch.manual_seed(5)
    form = causal_conv.Form(2048, 3, True)
    rand = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()  # noqa: E731
    x, weight, bias, conv = rand(TOKENS, 3 * 2048), rand(2048, 3), rand(2048), torch.zeros(4, 2, 2048).cuda().bfloat16()

    def step(*requests):
        sizes = [last - first for _, first, last in requests]
        which = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(torch.int32).cuda()
        fresh = torch.tensor([first == 0 for _, first, _ in requests], dtype=torch.int8, device="cuda")
        given = torch.cat([x[first:last] for _, first, last in requests]), weight, bias, conv
        slots, starts = ints(*(slot for slot, *_ in requests)), ints(0, *sizes).cumsum(0).to(torch.int32)
        return causal_conv.run(form, *given, slots, starts, fresh, which).split(sizes)

    (want,) = step((1, 0, TOKENS))
    state = conv[1].clone()
    got = [step((3, 0, 17), (2, 0, 100))[1], *step((2, 100, 200))]
    for t in range(200, TOKENS):
        got.append(causal_conv.run(form, x[[0, t]], weight, bias, conv, ints(0, 2), None, None, None)[1:])
    assert torch.equal(torch.cat(got), want) and torch.equal(conv[2], state)


def test_cuts_and_decodes_of_mamba_1():
    torch.manual_seed(5)
    channels = 8192
    rand = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()  # noqa: E731
    tokens = [rand(TOKENS, n) for n in (channels, channels, 16, 16, channels)]
    parameters = -torch.rand(channels, 16, device="cuda"), *torch.randn(2, channels, device="cuda")
    states = torch.zeros(4, channels, 16, device="cuda")

    def step(*requests):
        sizes = [last - first for _, first, last in requests]
        fresh = torch.tensor([first == 0 for _, first, _ in requests], dtype=torch.int8, device="cuda")
        given = [torch.cat([t[first:last] for _, first, last in requests]) for t in tokens]
        slots, starts = ints(*(slot for slot, *_ in requests)), ints(0, *sizes).cumsum(0).to(torch.int32)
        return mamba1.run(*given, *parameters, states, slots, starts, fresh).split(sizes)

    (want,) = step((1, 0, TOKENS))
    state = states[1].clone()
    got = [step((3, 0, 17), (2, 0, 100))[1], *step((2, 100, 200))]
    for t in range(200, TOKENS):
        given = [held[[0, t]] for held in tokens]
        got.append(mamba1.run(*given, *parameters, states, ints(0, 2), None, None)[1:])
    assert torch.equal(torch.cat(got), want) and torch.equal(states[2], state)
