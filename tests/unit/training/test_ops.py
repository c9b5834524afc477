"""The trainer's operators: gradients against autograd in double precision, rows alone, and what the compiler sees."""

import pytest
import torch
from torch.nn import functional

from bi_patch.ops import bits
from bi_patch.training import ops

STARTS, LENGTHS = torch.tensor([1, 9]), torch.tensor([6, 8])  # row 0, 7, 8 and 17 are padding


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) * 100 + shape[-1]))


def close(ours, reference, *inputs):
    """Compare values and gradients of `ours` in fp32 with those of `reference` in double precision."""
    single = [x.clone().requires_grad_() for x in inputs]
    double = [x.double().requires_grad_() for x in inputs]
    got, want = ours(*single), reference(*double)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    (got * weights).sum().backward()
    (want * weights.double()).sum().backward()
    for a, b in zip(single, double):
        scale = float(b.grad.abs().max())
        torch.testing.assert_close(a.grad.double() / scale, b.grad / scale, rtol=0, atol=5e-6)


def test_linear():
    close(ops.linear, functional.linear, randn(3, 5, 64), randn(32, 64), randn(32))
    close(lambda x, w: ops.linear(x, w, None, 4), functional.linear, randn(3, 5, 64), randn(32, 64))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset):
    def reference(x, weight):
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (weight + offset)

    close(lambda x, w: ops.rms_norm(x, w, 1e-5, offset), reference, randn(3, 5, 64), randn(64))


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gated(kind):
    plain = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }[kind]
    close(lambda g, u: ops.gated(g, u, kind), lambda g, u: plain(g) * u, randn(2, 7, 48), randn(3, 7, 48)[:2])


def test_rope():
    table = randn(9, 32)

    def reference(x):
        cos, sin = table.to(x.dtype)[:, None].chunk(2, -1)
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    close(lambda x: ops.rope(x, table), reference, randn(9, 4, 32))


def test_embedding():
    ids = torch.tensor([[3, 1, 3], [0, 3, 9]])
    close(lambda w: ops.embedding(ids, w, torch.float32), lambda w: functional.embedding(ids, w), randn(10, 16))


def test_a_padding_token_gets_no_gradient():
    ids = torch.tensor([[3, 1, 3], [0, 3, 9]])
    run = functional.embedding
    close(lambda w: ops.embedding(ids, w, torch.float32, 3), lambda w: run(ids, w, padding_idx=3), randn(10, 16))


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_attention(window, softcap):
    def reference(query, key, value):
        rows = []
        for first, count in zip(STARTS.tolist(), LENGTHS.tolist()):
            at = torch.arange(count)
            hidden = at[:, None] < at
            if window:
                hidden = hidden | (at[:, None] - at >= window)
            q, k, v = (x[first : first + count].transpose(0, 1) for x in (query, key, value))
            k, v = (x.repeat_interleave(2, 0) for x in (k, v))
            scores = q @ k.transpose(1, 2) * 0.3
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            rows.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1))
        gap = query.new_zeros(1, *query.shape[1:])
        return torch.cat((gap, rows[0], gap, gap, rows[1], gap))

    def ours(query, key, value):
        return ops.attention(query, key, value, STARTS, LENGTHS, 0.3, window, softcap)

    close(ours, reference, randn(18, 4, 32), randn(18, 2, 32), randn(18, 2, 48)[..., :32])


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_token_logprobs_in_chunks(softcap):
    tokens = torch.arange(70)
    heat = torch.linspace(0.5, 1.5, 70)

    def reference(hidden, weight):
        logits = hidden @ weight.T
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        return (logits / heat.double()[:, None]).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

    def ours(hidden, weight):
        return ops.token_logprobs(hidden, weight, tokens, heat, None, None, softcap)

    close(ours, reference, randn(70, 32), randn(100, 32) * 0.3)


def test_token_logprobs_after_truncation():
    hidden, weight = randn(6, 32), randn(100, 32) * 0.1
    tokens = (hidden @ weight.T).argsort(-1)[:, -3]
    k, p = torch.tensor([3, 2, 100, 100, 3, 100]), torch.tensor([1, 1, 0.999, 1e-6, 0.9999, 1])
    found = ops.token_logprobs(hidden, weight, tokens, torch.ones(6), k, p)
    assert found.isinf().tolist() == [False, True, False, True, False, False]
    kept = (hidden @ weight.T)[0].topk(3).values.log_softmax(-1)
    torch.testing.assert_close(found[0], kept[2])
    assert found[5] == ops.token_logprobs(hidden, weight, tokens, torch.ones(6))[5]


def test_master_weights_round_in_the_forward_and_keep_their_gradients_wide():
    x, weight, bias = randn(5, 64).bfloat16(), randn(32, 64).requires_grad_(), randn(32).requires_grad_()
    found = ops.linear(x, weight, bias)
    assert not bits.differing(found, ops.linear(x, weight.detach().bfloat16(), bias.detach().bfloat16()))
    found.float().sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    assert not bits.differing(weight.grad, x.float().sum(0).expand(32, 64).contiguous())


def test_virtual_ranks_add_in_their_order_and_round_once_each():
    x, weight, bias = randn(5, 64).bfloat16(), randn(32, 64).bfloat16(), randn(32).bfloat16()
    parts = [ops.linear(x[:, i : i + 16].contiguous(), weight[:, i : i + 16].contiguous()) for i in range(0, 64, 16)]
    parts[0] = ops.linear(x[:, :16].contiguous(), weight[:, :16].contiguous(), bias)
    total = parts[0].float()
    for part in parts[1:]:
        total += part.float()
    assert not bits.differing(ops.linear(x, weight, bias, 4), total.bfloat16())


def test_gradients_of_a_row_do_not_depend_on_other_rows():
    def grads(rows):
        x = randn(33, 64).bfloat16()[rows].requires_grad_()
        found = ops.rms_norm(ops.linear(x, randn(64, 64).bfloat16()), torch.ones(64).bfloat16(), 1e-5)
        ops.gated(found, found, "silu").backward(randn(33, 64).bfloat16()[rows])
        return x.grad

    assert not bits.differing(grads(slice(0, 33))[7:9], grads(slice(7, 9)))


def operators():
    def wide(*shape):
        return randn(*shape).requires_grad_()

    heads = (wide(18, 4, 32), wide(18, 2, 32), wide(18, 2, 32), STARTS, LENGTHS, 0.3, 3, 5.0, "")
    score = (wide(70, 32), wide(100, 32), torch.arange(70), torch.ones(70), None, None, 0.0, "V2", False)
    return {
        "linear": (wide(5, 64), wide(32, 64), wide(32), 2),
        "rms_norm": (wide(5, 64), wide(64), 1e-5, 0.0),
        "head_norm": (wide(5, 3, 64), wide(64), 1e-5),
        "gated": (wide(5, 64), wide(5, 64), "silu"),
        "rope": (wide(9, 4, 32), randn(9, 32)),
        "embedding": (torch.arange(5), wide(10, 16), torch.bfloat16, 3),
        "attention": heads,
        "token_logprobs": score,
    }


@pytest.mark.parametrize("name", operators())
def test_the_compiler_sees_one_node(name):
    torch.library.opcheck(getattr(torch.ops.bi_training, name).default, operators()[name])
