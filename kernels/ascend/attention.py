"""Attention with KV cut at fixed positions, so a row has the same bits in decode, prefill and any chunk of a prompt.

out[t, h] = softmax(scale * q[t, h] K^T) V for packed sequences: query [T, H, D], keys and values dense [S, KVH, D] or
paged [blocks, block size, KVH, D], all of one dtype; scores and sums in fp32. Options: causal mask, sliding window,
sinks. Limits: block size a multiple of 128, heads of at most 256 elements (chips.attention_rows).

Order of one row (token, head): keys are cut into leaves of LEAF positions, aligned at 0. In a leaf:
    score = scale * dot(q, k); m = max(score); p = exp(score - m); l = sum(p); o = p @ v, p rounded to v's dtype.
Leaves are merged in ascending order, as in FlashAttention-2 (Dao 2023): with m' = max(m, m_leaf),
    l = l e^(m - m') + l_leaf e^(m_leaf - m'), and the same for o.
Last, o / l is rounded once. A leaf without a visible key is skipped; any other masked key adds an exact zero.

Two forms have the same bits, so the number of rows may choose between them. For few rows, `_leaves` computes one leaf
per program and `_merge` merges the leaves. For many rows, one program of `_whole` computes all leaves of its rows.
"""

import torch
import triton
import triton.language as tl

from .chips import Chip, attention_rows
from .scalars import wide

LEAF = 128
# Up to this many rows, leaves run in separate programs.
SPLIT_ROWS = 256


@triton.jit
def _leaf(
    q,
    key,
    value,
    table,
    sequence,
    kv_start,
    kv_len,
    leaf,
    position,
    kv_head,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_table,
    scale,
    window,
    d_qk,
    d_v,
    PAGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    LEAF: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """(m, l, o) of one leaf, for rows q [ROWS, DIM] at `position` [ROWS]; a row at position -1 sees no key."""
    s = leaf * LEAF + tl.arange(0, LEAF)
    d = tl.arange(0, DIM)
    dv = tl.arange(0, DIM_V)
    if PAGED:
        # A leaf lies in one block, because BLOCK_SIZE is a multiple of LEAF.
        block = tl.load(table + sequence * stride_table + (leaf * LEAF) // BLOCK_SIZE).to(tl.int64)
        first = block * BLOCK_SIZE + (leaf * LEAF) % BLOCK_SIZE
    else:
        first = kv_start + leaf * LEAF
    inside = s < kv_len
    at = first + tl.arange(0, LEAF)
    k = tl.load(
        key + at[:, None] * stride_kt + kv_head * stride_kh + d[None, :],
        mask=inside[:, None] & (d[None, :] < d_qk),
        other=0.0,
    )
    v = tl.load(
        value + at[:, None] * stride_vt + kv_head * stride_vh + dv[None, :],
        mask=inside[:, None] & (dv[None, :] < d_v),
        other=0.0,
    )
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    seen = inside[None, :] & (position[:, None] >= 0)
    if CAUSAL:
        seen = seen & (s[None, :] <= position[:, None]) & (s[None, :] >= position[:, None] - window)
    score = tl.where(seen, score, -1.0e38)
    m = tl.max(score, axis=1)
    p = tl.where(seen, tl.exp(score - m[:, None]), 0.0)
    l = tl.sum(p, axis=1)  # noqa: E741
    o = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return m, l, o


@triton.jit
def _add_leaf(m, l, o, m_leaf, l_leaf, o_leaf):  # noqa: E741
    """Merge a leaf into (m, l, o). Rows that see no key of the leaf keep their values."""
    new = tl.maximum(m, m_leaf)
    old_part = tl.exp(m - new)
    leaf_part = tl.exp(m_leaf - new)
    used = l_leaf > 0.0
    l = tl.where(used, l * old_part + l_leaf * leaf_part, l)  # noqa: E741
    o = tl.where(used[:, None], o * old_part[:, None] + o_leaf * leaf_part[:, None], o)
    m = tl.where(used, new, m)
    return m, l, o


@triton.jit
def _result(m, l, o, sinks, head, HAS_SINK: tl.constexpr):  # noqa: E741
    """o / l after the last leaf; with HAS_SINK, l includes the sink's logit."""
    if HAS_SINK:
        sink = tl.load(sinks + head).to(tl.float32)
        new = tl.maximum(m, sink)
        l = l * tl.exp(m - new) + tl.exp(sink - new)  # noqa: E741
        o = o * tl.exp(m - new)[:, None]
    return o / tl.where(l > 0.0, l, 1.0)[:, None]


@triton.jit
def _rows(tiles, tile, queries_per_kv, CAUSAL: tl.constexpr, ROWS: tl.constexpr):
    """Unpack entry `tile` of a schedule.

    Returns the sequence; per row its token, head in the group, position, and whether the row exists; and the
    sequence's first key, its number of keys, and how many of these the tile's rows see.
    """
    sequence = tl.load(tiles + tile * 6).to(tl.int64)
    token = tl.load(tiles + tile * 6 + 1)
    last = tl.load(tiles + tile * 6 + 2)
    offset = tl.load(tiles + tile * 6 + 3)
    kv_start = tl.load(tiles + tile * 6 + 4).to(tl.int64)
    kv_len = tl.load(tiles + tile * 6 + 5)
    r = tl.arange(0, ROWS)
    at = token + r // queries_per_kv
    # Rows after the last token see no key and are not stored.
    position = tl.where(at < last, at + offset, -1)
    visible = kv_len
    if CAUSAL:
        visible = last + offset  # no row of the tile sees later keys
    return sequence, at, r % queries_per_kv, position, at < last, kv_start, kv_len, visible


@triton.jit
def _whole(
    query,
    key,
    value,
    table,
    tiles,
    sinks,
    out,
    count,
    kv_heads,
    queries_per_kv,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_table,
    scale,
    window,
    d_qk,
    d_v,
    PAGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_SINK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    LEAF: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    d = tl.arange(0, DIM)
    dv = tl.arange(0, DIM_V)
    for job in range(tl.program_id(0), count * kv_heads, PROGRAMS):
        kv_head = job % kv_heads
        sequence, at, group, position, real, kv_start, kv_len, visible = _rows(
            tiles, job // kv_heads, queries_per_kv, CAUSAL, ROWS
        )
        head = kv_head * queries_per_kv + group
        q = tl.load(
            query + at[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :],
            mask=real[:, None] & (d[None, :] < d_qk),
            other=0.0,
        )
        m = tl.full((ROWS,), -1.0e38, dtype=tl.float32)
        l = tl.zeros((ROWS,), dtype=tl.float32)  # noqa: E741
        o = tl.zeros((ROWS, DIM_V), dtype=tl.float32)
        for leaf in range(0, tl.cdiv(visible, LEAF)):
            m_leaf, l_leaf, o_leaf = _leaf(
                q,
                key,
                value,
                table,
                sequence,
                kv_start,
                kv_len,
                leaf,
                position,
                kv_head,
                stride_kt,
                stride_kh,
                stride_vt,
                stride_vh,
                stride_table,
                scale,
                window,
                d_qk,
                d_v,
                PAGED,
                CAUSAL,
                BLOCK_SIZE,
                ROWS,
                LEAF,
                DIM,
                DIM_V,
            )
            m, l, o = _add_leaf(m, l, o, m_leaf, l_leaf, o_leaf)  # noqa: E741
        result = _result(m, l, o, sinks, head, HAS_SINK)
        tl.store(
            out + (at[:, None] * kv_heads * queries_per_kv + head[:, None]) * d_v + dv[None, :],
            result.to(out.dtype.element_ty),
            mask=real[:, None] & (dv[None, :] < d_v),
        )


@triton.jit
def _leaves(
    query,
    key,
    value,
    table,
    tiles,
    part_m,
    part_l,
    part_o,
    count,
    most_leaves,
    kv_heads,
    queries_per_kv,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_table,
    scale,
    window,
    d_qk,
    d_v,
    PAGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    LEAF: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    d = tl.arange(0, DIM)
    dv = tl.arange(0, DIM_V)
    r = tl.arange(0, ROWS)
    for job in range(tl.program_id(0), count * kv_heads * most_leaves, PROGRAMS):
        leaf = job % most_leaves
        tile_head = job // most_leaves
        kv_head = tile_head % kv_heads
        sequence, at, group, position, real, kv_start, kv_len, visible = _rows(
            tiles, tile_head // kv_heads, queries_per_kv, CAUSAL, ROWS
        )
        if leaf * LEAF < visible:
            head = kv_head * queries_per_kv + group
            q = tl.load(
                query + at[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :],
                mask=real[:, None] & (d[None, :] < d_qk),
                other=0.0,
            )
            m, l, o = _leaf(  # noqa: E741
                q,
                key,
                value,
                table,
                sequence,
                kv_start,
                kv_len,
                leaf,
                position,
                kv_head,
                stride_kt,
                stride_kh,
                stride_vt,
                stride_vh,
                stride_table,
                scale,
                window,
                d_qk,
                d_v,
                PAGED,
                CAUSAL,
                BLOCK_SIZE,
                ROWS,
                LEAF,
                DIM,
                DIM_V,
            )
            place = wide(job) * ROWS + r
            tl.store(part_m + place, m)
            tl.store(part_l + place, l)
            tl.store(part_o + place[:, None] * DIM_V + dv[None, :], o)


@triton.jit
def _merge(
    tiles,
    sinks,
    part_m,
    part_l,
    part_o,
    out,
    count,
    most_leaves,
    kv_heads,
    queries_per_kv,
    d_v,
    CAUSAL: tl.constexpr,
    HAS_SINK: tl.constexpr,
    ROWS: tl.constexpr,
    LEAF: tl.constexpr,
    DIM_V: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    dv = tl.arange(0, DIM_V)
    r = tl.arange(0, ROWS)
    for job in range(tl.program_id(0), count * kv_heads, PROGRAMS):
        kv_head = job % kv_heads
        sequence, at, group, position, real, kv_start, kv_len, visible = _rows(
            tiles, job // kv_heads, queries_per_kv, CAUSAL, ROWS
        )
        head = kv_head * queries_per_kv + group
        m = tl.full((ROWS,), -1.0e38, dtype=tl.float32)
        l = tl.zeros((ROWS,), dtype=tl.float32)  # noqa: E741
        o = tl.zeros((ROWS, DIM_V), dtype=tl.float32)
        for leaf in range(0, tl.cdiv(visible, LEAF)):
            place = (wide(job) * most_leaves + leaf) * ROWS + r
            m_leaf = tl.load(part_m + place)
            l_leaf = tl.load(part_l + place)
            o_leaf = tl.load(part_o + place[:, None] * DIM_V + dv[None, :])
            m, l, o = _add_leaf(m, l, o, m_leaf, l_leaf, o_leaf)  # noqa: E741
        result = _result(m, l, o, sinks, head, HAS_SINK)
        tl.store(
            out + (at[:, None] * kv_heads * queries_per_kv + head[:, None]) * d_v + dv[None, :],
            result.to(out.dtype.element_ty),
            mask=real[:, None] & (dv[None, :] < d_v),
        )


def schedule(query_ends: list[int], kv_lens: list[int], kv_starts: list[int], per_tile: int) -> list[list[int]]:
    """Cut each sequence into tiles of at most per_tile tokens.

    A tile is [sequence, first token, end of tokens, position - token, kv_start, kv_len].
    """
    tiles, first = [], 0
    for sequence, (end, length) in enumerate(zip(query_ends, kv_lens, strict=True)):
        offset = length - end  # a sequence's last token is at its last position
        tiles += [
            [sequence, token, min(token + per_tile, end), offset, kv_starts[sequence], length]
            for token in range(first, end, per_tile)
        ]
        first = end
    return tiles


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: list[int],
    kv_lens: list[int],
    scale: float,
    chip: Chip,
    block_table: torch.Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    split: bool | None = None,
) -> torch.Tensor:
    """Attention of packed sequences -> [T, H, Dv], of query's dtype.

    query: [T, H, D]. query_ends: where each sequence's tokens end in query. kv_lens: keys of each sequence, those of
    its queries included. Without block_table, key [S, KVH, D] and value [S, KVH, Dv] hold the sequences one after
    another. With block_table [B, blocks], int32, key and value are paged: [blocks, block size, KVH, D or Dv], with a
    block size that is a multiple of 128. window: how many keys before its own a query sees; None for all. sinks: [H],
    a logit per head that every row's sum includes. split: True for `_leaves`, False for `_whole`, for tests; the bits
    are the same. Raises ValueError for other shapes, dtypes, block sizes or head sizes.
    """
    paged = block_table is not None
    want = 4 if paged else 3
    if query.dim() != 3 or key.dim() != want or value.dim() != want or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"attention takes query [T, H, D] and {want}-dimensional keys and values of one dtype, not "
            f"{tuple(query.shape)} {query.dtype}, {tuple(key.shape)} {key.dtype}, {tuple(value.shape)} {value.dtype}"
        )
    if paged and key.shape[1] % LEAF:
        raise ValueError(f"the block size must be a multiple of {LEAF}, not {key.shape[1]}")
    tokens, heads, d_qk = query.shape
    kv_heads, d_v = key.shape[-2], value.shape[-1]
    if heads % kv_heads:
        raise ValueError(f"{heads} heads are no multiple of {kv_heads} KV heads")
    block_size = key.shape[1] if paged else LEAF
    if paged:
        key, value = key.flatten(0, 1), value.flatten(0, 1)
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    group = heads // kv_heads
    rows = attention_rows(chip, group, max(d_qk, d_v))
    starts = [0] * len(kv_lens)
    if not paged:
        starts = [sum(kv_lens[:i]) for i in range(len(kv_lens))]
    lines = schedule(query_ends, kv_lens, starts, rows // group)
    out = torch.zeros((tokens, heads, d_v), dtype=query.dtype, device=query.device)
    if not lines:
        return out
    tiles = torch.tensor(lines, dtype=torch.int32).to(query.device)
    table = block_table if paged else tiles
    held = sinks if sinks is not None else query
    dims = {"DIM": max(16, triton.next_power_of_2(d_qk)), "DIM_V": max(16, triton.next_power_of_2(d_v))}
    shared = dict(PAGED=paged, CAUSAL=causal, BLOCK_SIZE=block_size, ROWS=rows, LEAF=LEAF, **dims)
    before = 2**30 if window is None else window
    strides = (
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        table.stride(0),
        float(scale),
        before,
        d_qk,
        d_v,
    )
    jobs = len(lines) * kv_heads
    if split is None:
        split = tokens * group <= SPLIT_ROWS
    if not split:
        programs = min(chip.cube_cores, jobs)
        _whole[(programs,)](
            query,
            key,
            value,
            table,
            tiles,
            held,
            out,
            len(lines),
            kv_heads,
            group,
            *strides,
            HAS_SINK=sinks is not None,
            PROGRAMS=programs,
            **shared,
        )
        return out
    leaves = triton.cdiv(max(kv_lens), LEAF)
    part_m = torch.empty((jobs * leaves * rows,), dtype=torch.float32, device=query.device)
    part_l = torch.empty_like(part_m)
    part_o = torch.empty((jobs * leaves * rows, dims["DIM_V"]), dtype=torch.float32, device=query.device)
    programs = min(chip.cube_cores, jobs * leaves)
    _leaves[(programs,)](
        query,
        key,
        value,
        table,
        tiles,
        part_m,
        part_l,
        part_o,
        len(lines),
        leaves,
        kv_heads,
        group,
        *strides,
        PROGRAMS=programs,
        **shared,
    )
    programs = min(chip.vector_cores, jobs)
    _merge[(programs,)](
        tiles,
        held,
        part_m,
        part_l,
        part_o,
        out,
        len(lines),
        leaves,
        kv_heads,
        group,
        d_v,
        CAUSAL=causal,
        HAS_SINK=sinks is not None,
        ROWS=rows,
        LEAF=LEAF,
        DIM_V=dims["DIM_V"],
        PROGRAMS=programs,
    )
    return out
