"""Gradients of attention on a GPU: close to fp64, and a sequence's bits alone, packed, and beside NaNs."""

import pytest
import torch

from bi_patch.ops import bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

LENGTHS = (1, 17, 64, 129, 500, 1000)


def reference(q, k, v, do, scale):
    """(o, dq, dk, dv) of one sequence in fp64."""
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in wide[1:])
    scores = torch.einsum("ihd,jhd->hij", wide[0], keys) * scale
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    o = torch.einsum("hij,jhd->ihd", scores.softmax(-1), values)
    return o.detach(), *torch.autograd.grad(o, wide, do.double())


def limits(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [64, 96, 128])
def test_a_sequence_has_its_own_gradients(size, group):
    from bi_patch.kernels.triton import attention_backward, attention_lse

    generator = torch.Generator("cuda").manual_seed(size + group)

    def random(heads):
        shape = (sum(LENGTHS), heads, size)
        return torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)

    q, k, v, do = random(8), random(8 // group), random(8 // group), random(8)
    scale, starts = size**-0.5, limits(*LENGTHS)
    spans = [slice(a, b) for a, b in zip(starts.tolist(), starts.tolist()[1:])]
    o, *want = (torch.cat(parts) for parts in zip(*(reference(q[s], k[s], v[s], do[s], scale) for s in spans)))
    o = o.to(torch.bfloat16)
    lse = attention_lse.lse(q, k, starts, max(LENGTHS), scale)
    got = attention_backward.backward(q, k, v, o, lse, do, starts, max(LENGTHS), scale)
    for found, wanted in zip(got, want):
        assert float((found.double() - wanted).norm() / wanted.norm()) < 8e-3
    for span, count in zip(spans, LENGTHS):
        held = [x[span].clone() for x in (q, k, v, o)]
        alone = attention_backward.backward(
            *held, lse[:, span].clone(), do[span].clone(), limits(count), count + 300, scale
        )
        assert [bits.differing(a, b[span]) for a, b in zip(alone, got)] == [0, 0, 0]
    kept = spans[3]
    for x in (q, k, v, o, do):
        x[: kept.start] = x[kept.stop :] = torch.nan
    beside = attention_backward.backward(q, k, v, o, lse, do, starts, max(LENGTHS), scale)
    assert [bits.differing(a[kept], b[kept]) for a, b in zip(beside, got)] == [0, 0, 0]
