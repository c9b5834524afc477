"""Faults of models with MLA: latents are cut where the order forbids a cut, a token takes the other form of MLA, or the
chosen experts come in no order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from bi_patch.tools.faults import latent_cuda, parts
from bi_patch.tools.faults.attention import Cut, overwrite
from bi_patch.tools.faults.base import BOTH, FEW, Fault, platform
from bi_patch.tools.faults.experts import EXPERTS, each_moe, one_expert_at_a_time
from bi_patch.tools.verify.engine import LocalEngine

MODEL = "DeepSeek V2"  # the faults are planted in an engine of this family (tools/models/families.py)
_SEAM = {"cpu": "mla.cpu_forward", "cuda": "mla.cuda_backend"}


@contextlib.contextmanager
def _instead(make: Callable) -> Iterator[None]:
    """The served attention, and then make(the same arguments), which overwrites rows of its output."""
    from bi_patch.ops.cpu import latent as op

    held = op.attention

    def attention(*given):
        held(*given)
        make(*given)

    op.attention = attention
    try:
        yield
    finally:
        op.attention = held


def _back(found, absorbed, heads: int) -> torch.Tensor:
    """Outputs in the space of latents [n, heads, latent], multiplied back into the heads' space."""
    out = found.new_empty((len(found), heads, absorbed.size))
    torch.ops.bi_cpu.heads_gemm(out, found.contiguous(), absorbed.value)
    return out


def _cut(cut: Cut) -> contextlib.AbstractContextManager[None]:
    """The absorbed form, except that the latents of a sequence are cut at the edges that `cut` returns."""

    def make(out, query, absorbed, cache, query_start_loc, seq_lens, block_table, scale):
        tokens, heads, _ = query.shape
        asked = query.new_empty((tokens, heads, cache.shape[-1]))
        torch.ops.bi_cpu.heads_gemm(asked[..., : absorbed.latent], query[..., : absorbed.nope], absorbed.key)
        asked[..., absorbed.latent :] = query[..., absorbed.nope :]

        def read(blocks, length):
            latents = cache[blocks.long()].flatten(0, 1)[:length].unsqueeze(1)
            return latents, latents[..., : absorbed.latent]

        def attend(rows, key, value, edges, scale):
            return _back(parts.attend(rows, key, value, edges, scale), absorbed, heads)

        shaped = out.view(tokens, heads, absorbed.size)
        overwrite(cut, shaped, asked, query_start_loc, seq_lens, block_table, cache.shape[1], read, scale, attend)

    return _instead(make)


def splits(engine: LocalEngine):
    """With one or two sequences, latents have four equal splits, so that all threads have work; with more, none."""
    return _cut(lambda s: parts.evenly(s.length, 4) if s.count <= 2 and s.length >= 4 else None)


def context_apart(engine: LocalEngine):
    """A chunk attends to its context and to itself separately, and the two are merged at the scheduler's cut."""
    return _cut(lambda s: [s.length - s.query] if 1 < s.query < s.length else None)


def other_form(engine: LocalEngine):
    """Several rows of a sequence, as in a prompt or a recomputation, take the form with up-projected keys and values;
    single rows take the absorbed form."""

    def make(out, query, absorbed, cache, query_start_loc, seq_lens, block_table, scale):
        heads = query.shape[1]
        eye = torch.eye(absorbed.latent, dtype=query.dtype).unsqueeze(1).expand(-1, heads, -1).contiguous()
        value = _back(eye, absorbed, heads)  # [latent, heads, size]
        key = _weights(absorbed, heads, query.dtype)  # [heads, latent, nope]

        def read(blocks, length):
            latents = cache[blocks.long()].flatten(0, 1)[:length]
            low, turned = latents[:, : absorbed.latent], latents[:, None, absorbed.latent :].expand(-1, heads, -1)
            up = torch.einsum("tl,hlp->thp", low.float(), key.float()).to(low.dtype)
            return torch.cat([up, turned], -1), torch.einsum("tl,lhv->thv", low.float(), value.float()).to(low.dtype)

        shaped = out.view(len(query), heads, absorbed.size)
        cut = lambda s: [s.length] if s.query > 1 else None  # noqa: E731
        overwrite(cut, shaped, query, query_start_loc, seq_lens, block_table, cache.shape[1], read, scale, parts.attend)

    return _instead(make)


def _weights(absorbed, heads: int, dtype) -> torch.Tensor:
    """The up-projection of keys [heads, latent, nope] that a layer computes with: its product with 1 is exact."""
    eye = torch.eye(absorbed.nope, dtype=dtype).unsqueeze(1).expand(-1, heads, -1).contiguous()
    out = eye.new_empty((absorbed.nope, heads, absorbed.latent))
    torch.ops.bi_cpu.heads_gemm(out, eye, absorbed.key)
    return out.permute(1, 2, 0)


def unsorted_choice(engine: LocalEngine):
    """The choice of experts among groups has no order: it lists them by number for more than four rows, otherwise by
    score. Experts are added in the order of this list, in the rows' type."""

    def make(layer, own):
        def run(x, weights, ids):
            if x.shape[0] > FEW:
                ids, order = ids.sort(-1)
                weights = weights.gather(-1, order)
            return one_expert_at_a_time(own, x, weights, ids, range(ids.shape[1]))

        return run

    return each_moe(engine, make)


def _fault(name: str, cause: int, axis: str, on_cpu, on_cuda) -> Fault:
    def plant(engine: LocalEngine):
        return (on_cpu if platform() == "cpu" else on_cuda)(engine)

    return Fault(name, cause, on_cpu.__doc__, axis, plant, BOTH, "attn", seam=_SEAM, model=MODEL)


FAULTS = (
    _fault("latents split by the batch", 3, "batch size", splits, latent_cuda.splits),
    _fault("latents of context and chunk apart", 6, "prefix cache", context_apart, latent_cuda.context_apart),
    _fault("MLA's other form on recomputation", 9, "preemption", other_form, latent_cuda.other_form),
    Fault(
        "unsorted choice of grouped experts",
        13,
        unsorted_choice.__doc__,
        "batch size",
        unsorted_choice,
        BOTH,
        "mlp.experts",
        seam=EXPERTS,
        model=MODEL,
    ),
)
