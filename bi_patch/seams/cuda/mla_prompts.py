"""Prompts of MLA in a form of their own: keys and values of all positions are projected up from the cached latents, and
attention runs over them in one chain from position 0.

vLLM attends to a chunk and to its context separately, and merges the two where the scheduler cut. Here a chunk attends
to all keys at once, cached or not, so that no cut shows. The up-projection is a linear whose rows do not depend on each
other (bi_patch.ops.cuda.linear). Of an 8-bit cache, a chunk reads its own latents back, as a later chunk will.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cuda.attention import eighth

# FlashAttention 3 has another tile for short queries, as in attention.py. It never takes it for 128 tokens or more.
LONG_QUERY = 128


class Segment(NamedTuple):
    """Prompt rows of one request in a step. first: of its rows, in the step. count: of rows. keys: up to the last row.
    request: its place in the step, i.e. its row of the block table."""

    first: int
    count: int
    keys: int
    request: int


def groups(segments: list[Segment], most: int) -> list[list[Segment]]:
    """Segments in their order, in groups of at most `most` keys. A longer segment is a group of its own."""
    made: list[list[Segment]] = []
    held = 0
    for segment in segments:
        if not made or held + segment.keys > most:
            made.append([])
            held = 0
        made[-1].append(segment)
        held += segment.keys
    return made


class Group:
    """One group on the device. workspace: [most keys, latent + rotary], where the latents of a group are gathered."""

    def __init__(self, segments: list[Segment], block_table, workspace, device):
        import torch
        from vllm.utils.torch_utils import async_tensor_h2d

        self.segments, self.workspace = segments, workspace
        self.keys = sum(s.keys for s in segments)
        self.count = len(segments)
        self.longest_query = max(LONG_QUERY, *(s.count for s in segments))
        self.longest = max(s.keys for s in segments)
        self.fresh = all(s.keys == s.count for s in segments)
        first = segments[0].first
        following, starts, key_starts = first, [0], [0]
        joined = True
        for s in segments:
            joined &= s.first == following
            following = s.first + s.count
            starts.append(starts[-1] + s.count)
            key_starts.append(key_starts[-1] + s.keys)
        requests = [s.request for s in segments]
        numbers = [*starts, *key_starts, *requests, *(s.keys for s in segments)]
        on_device = async_tensor_h2d(numbers, device, torch.int32)
        n = len(segments)
        self.starts, self.key_starts = on_device[: n + 1], on_device[n + 1 : 2 * n + 2]
        lengths = on_device[3 * n + 2 :]
        if joined:
            self.rows = slice(first, following)
        else:
            rows = [row for s in segments for row in range(s.first, s.first + s.count)]
            self.rows = async_tensor_h2d(rows, device, torch.int64)
        if requests == list(range(requests[0], requests[0] + n)):
            self.block_table = block_table[requests[0] : requests[0] + n]
        else:
            self.block_table = block_table[on_device[2 * n + 2 : 3 * n + 2].long()]
        self.long = self.keys > len(workspace)
        if not self.long:
            places = torch.arange(n, dtype=torch.int32, device=device)
            self.sequences = torch.repeat_interleave(places, lengths.long(), output_size=self.keys)


def attend(impl, q, latents, rotary, cache, group: Group, out) -> None:
    """Write the rows of a group to out [tokens, heads * D].

    q: [tokens, heads, nope + rotary], latents: [tokens, latent] and rotary: [tokens, 1, rotary], all of the step.
    cache: [pages, tokens, latent + rotary], 16-bit or e4m3. It holds the latents of all positions, also of this step.
    """
    rows, heads, size = group.rows, impl.num_heads, impl.v_head_dim
    shaped = out.view(-1, heads, size)
    joined = isinstance(rows, slice)
    into = shaped[rows] if joined else shaped.new_empty((len(rows), heads, size))
    if group.long:
        _long(impl, q[rows], cache, group, into)
    else:
        if group.fresh and not eighth(impl.kv_cache_dtype):
            low, turned = latents[rows], rotary[rows]
        else:
            low, turned = _gather(impl, cache, group.workspace, group.block_table, group.key_starts, group.sequences)
        key, value = _project(impl, low, turned)
        _flash(impl, q[rows], key, value, group, into)
    if not joined:
        shaped[rows] = into


@functools.cache
def _one(device):
    import torch

    return torch.ones((), dtype=torch.float32, device=device)


def _gather(impl, cache, workspace, block_table, starts, sequences, first=None):
    """The cached latents of a group's keys: [keys, latent] and [keys, 1, rotary]."""
    from vllm import _custom_ops as ops

    count = len(sequences)
    scale = _one(cache.device)
    ops.gather_and_maybe_dequant_cache(
        cache, workspace, block_table, starts, sequences, count, impl.kv_cache_dtype, scale, first
    )
    held = workspace[:count]
    return held[..., : impl.kv_lora_rank], held[..., impl.kv_lora_rank :].unsqueeze(1)


def _project(impl, low, turned):
    """Keys [keys, heads, nope + rotary] and values [keys, heads, D] of latents."""
    up = impl.kv_b_proj(low)[0].view(-1, impl.num_heads, impl.qk_nope_head_dim + impl.v_head_dim)
    nope, value = up.split([impl.qk_nope_head_dim, impl.v_head_dim], dim=-1)
    return impl._concat_k_nope_k_pe(nope, turned), value


def _flash(impl, q, key, value, group: Group, out) -> None:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    flash_attn_varlen_func(
        q=q,
        k=key,
        v=value,
        out=out,
        max_seqlen_q=group.longest_query,
        cu_seqlens_q=group.starts,
        max_seqlen_k=group.longest,
        cu_seqlens_k=group.key_starts,
        softmax_scale=impl.scale,
        causal=True,
        num_splits=1,
        fa_version=3,
    )


def _long(impl, q, cache, group: Group, out) -> None:
    """A segment with more keys than the workspace: some heads at a time, over all of its keys."""
    import torch

    heads, most, keys = impl.num_heads, len(group.workspace), group.keys
    if group.count != 1:
        raise UnsupportedFeature(
            "mla.cuda_prompts: a group of several segments exceeds the workspace. Set BI_PATCH_MLA=one"
        )
    at_once = max(1, heads * most // (2 * keys))  # beside the projections of all heads, which are made for each part
    nope, wide = impl.qk_nope_head_dim, impl.qk_nope_head_dim + impl.qk_rope_head_dim
    for head in range(0, heads, at_once):
        some = slice(head, min(head + at_once, heads))
        count = some.stop - head
        key, value = q.new_empty((keys, count, wide)), q.new_empty((keys, count, impl.v_head_dim))
        for first in range(0, keys, most):
            number = min(most, keys - first)
            starts = torch.tensor([0, number], dtype=torch.int32).to(q.device, non_blocking=True)
            begin = torch.full((1,), first, dtype=torch.int32, device=q.device)
            sequences = torch.zeros(number, dtype=torch.int32, device=q.device)
            low, turned = _gather(impl, cache, group.workspace, group.block_table, starts, sequences, begin)
            up = impl.kv_b_proj(low)[0].view(number, heads, nope + impl.v_head_dim)[:, some]
            at = slice(first, first + number)
            key[at, :, :nope], key[at, :, nope:] = up[..., :nope], turned
            value[at] = up[..., nope:]
        into = out[:, some].contiguous()
        _flash(impl, q[:, some].contiguous(), key, value, group, into)
        out[:, some] = into
