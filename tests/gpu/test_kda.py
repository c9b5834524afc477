"""On a GPU: the bits of Kimi delta attention depend on nothing but the request's own tokens, in prompts and decodes."""

import pytest
import torch

from bi_patch.kernels.cuda import causal_conv, kda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

HEADS, TOKENS = 32, 333
CHANNELS = 3 * HEADS * kda.SIZE
CONV = causal_conv.Form(CHANNELS, kda.WIDTH, False, True)


def ints(*held):
    return torch.tensor(held, dtype=torch.int32, device="cuda")


class Layer:
    """A layer with random parameters and eight states, and one request's inputs."""

    def __init__(self):
        torch.manual_seed(5)
        rand = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
        self.weight, self.parameters = rand(CHANNELS, kda.WIDTH), (rand(HEADS), rand(HEADS * kda.SIZE))
        self.conv = torch.zeros(9, kda.WIDTH - 1, CHANNELS, device="cuda", dtype=torch.bfloat16)
        self.states = torch.zeros(9, HEADS, kda.SIZE, kda.SIZE, device="cuda")
        sizes = CHANNELS, HEADS * kda.SIZE, HEADS
        self.inputs = [rand(TOKENS, size).bfloat16() for size in sizes]

    def run(self, x, gate, beta, slots, starts=None, fresh=None, which=None):
        out = torch.empty(len(x), HEADS, kda.SIZE, dtype=x.dtype, device="cuda")
        y = causal_conv.run(CONV, x, self.weight, None, self.conv, slots, starts, fresh, which)
        kda.run(out, y, gate, beta, *self.parameters, self.states, slots, starts, fresh)
        return out

    def step(self, *requests):
        """Outputs of requests (slot, first token, last token) of prompts that all have the same inputs."""
        sizes = [last - first for _, first, last in requests]
        given = [torch.cat([t[first:last] for _, first, last in requests]) for t in self.inputs]
        which = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(torch.int32).cuda()
        fresh = torch.tensor([first == 0 for _, first, _ in requests], dtype=torch.int8, device="cuda")
        slots, starts = ints(*(slot for slot, *_ in requests)), ints(0, *sizes).cumsum(0).to(torch.int32)
        return self.run(*given, slots, starts, fresh, which).split(sizes)


def test_cuts_company_and_decodes():
    layer = Layer()
    (want,) = layer.step((1, 0, TOKENS))
    state = layer.states[1].clone()
    assert want.isfinite().all() and want.any()
    for cut in (1, 2, 8, 100, 332):
        parts = layer.step((2, 0, cut)) + layer.step((2, cut, TOKENS))
        assert torch.equal(torch.cat(parts), want) and torch.equal(layer.states[2], state)
    beside = layer.step((3, 0, 1), (4, 0, 17), (2, 0, TOKENS), (5, 0, 64), (6, 0, 300))
    assert torch.equal(beside[2], want) and torch.equal(beside[4], want[:300])
    rows = list(layer.step((2, 0, 200)))
    for t in range(200, TOKENS):
        given = [held[[t, *range(t % 5)]] for held in layer.inputs]
        rows.append(layer.run(*given, ints(2, 5, 6, 7, 8)[: 1 + t % 5].contiguous())[:1])
    assert torch.equal(torch.cat(rows), want) and torch.equal(layer.states[2], state)
