"""LoRA of experts: y[i] += w[i] (x[i] A[s, e]^T) B[s, e]^T for rows i of the adapter in slot s and of expert e.

A row is a token with one of its `top_k` experts: rows = tokens * top_k, token by token. y [rows, columns], x
[tokens, K] or [rows, K], A [slots, experts, R, K] and B [slots, experts, N, R] are bf16 or fp16. There are one or two
slices of A and B, which lie side by side in y. w [rows] fp32, the router's weights, is 1 if there is none.

Order of one row:
- t: K is cut into chunks of `lora.chunk(K)` elements. Each chunk has one fp32 accumulator, which starts at zero and
  takes K in ascending order. The chunk sums are added in ascending order, starting from zero, and t is rounded to the
  type.
- d: one fp32 accumulator takes R in ascending order, is multiplied by w, and is rounded to the type.
- y + d is rounded to the type.

A tile has at most BLOCK_M rows of one slot and one expert, and every size of a tile is the same for any number of rows.
Nothing is added by atomics. The work is shared out in two ways, which give the same bits. "fused", for few rows: a
program computes one chunk, and the programs of the second product add the chunks. "whole", for many rows: a program
computes all chunks of its rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .lora import BLOCK_K, chunk

BLOCK_M = 16  # rows of a tile, and of a block of vLLM's moe_lora_align_block_size
BLOCK_N = 128
FEW = 1024  # rows up to which the second product adds the chunks


class Blocks(NamedTuple):
    """Which rows a tile has. Without `padded`, each row has a tile of its own.

    rows: int32, the rows of each block, sorted by expert, [slots * length]; a number that is no row pads a block.
    experts: int32, the expert of each block, [slots * blocks], -1 for none; without `padded`, the expert of each row.
    padded: int32 [slots], how many of its rows a slot has, padding included, or None. mapping: int32, the slot of each
    token, negative for none. slots: int32, the slots to look at, negative for none. enabled: int32, whether the adapter
    in a slot changes these experts. active: how many of `slots` to look at.
    """

    rows: torch.Tensor | None
    experts: torch.Tensor
    padded: torch.Tensor | None
    mapping: torch.Tensor
    slots: torch.Tensor
    enabled: torch.Tensor
    active: int


@triton.jit
def _tile(
    pid_m, rows_ptr, experts_ptr, padded_ptr, mapping_ptr, slots_ptr, enabled_ptr, ROWS, LENGTH, BLOCKS, ACTIVE,
    TOP_K: tl.constexpr, SORTED: tl.constexpr, MOST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Slot, expert and rows of a tile, and which rows are there. The slot or the expert is negative for no tile.

    MOST: a power of 2, at least ACTIVE. The tiles of all slots are numbered slot after slot.
    """
    m = tl.arange(0, BLOCK_M)
    if SORTED:
        s = tl.arange(0, MOST)
        ids = tl.load(slots_ptr + s, mask=s < ACTIVE, other=-1)
        on = tl.load(enabled_ptr + tl.maximum(ids, 0), mask=ids >= 0, other=0)
        length = tl.load(padded_ptr + tl.maximum(ids, 0), mask=on != 0, other=0)
        count = length // BLOCK_M
        end = tl.cumsum(count, 0)
        mine = tl.where(end - count <= pid_m, tl.where(pid_m < end, 1, 0), 0)
        here = tl.sum(mine, 0)
        slot = tl.where(here != 0, tl.sum(ids * mine, 0), -1)
        block = tl.where(here != 0, pid_m - tl.sum((end - count) * mine, 0), 0)
        expert = tl.load(experts_ptr + slot.to(tl.int64) * BLOCKS + block, mask=slot >= 0, other=-1).to(tl.int32)
        held = tl.where(slot >= 0, block * BLOCK_M + m, LENGTH)
        row = tl.load(rows_ptr + slot.to(tl.int64) * LENGTH + held, mask=held < LENGTH, other=ROWS).to(tl.int32)
    else:
        slot = tl.load(mapping_ptr + pid_m // TOP_K)
        on = tl.load(enabled_ptr + tl.maximum(slot, 0), mask=slot >= 0, other=0)
        slot = tl.where(on != 0, slot, -1)
        expert = tl.load(experts_ptr + pid_m, mask=slot >= 0, other=-1).to(tl.int32)
        row = tl.where(m == 0, pid_m, ROWS)
    return slot, expert, row, row < ROWS


@triton.jit(do_not_specialize=["ROWS", "LENGTH", "BLOCKS", "ACTIVE"])
def _shrink(
    x_ptr, a_ptr, a2_ptr, t_ptr, rows_ptr, experts_ptr, padded_ptr, mapping_ptr, slots_ptr, enabled_ptr,
    ROWS, LENGTH, BLOCKS, ACTIVE, x_row, a_slot, a_expert,
    K: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, TOP_K: tl.constexpr,
    PER: tl.constexpr, SORTED: tl.constexpr, MOST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """t[slice, part, row, :]. PARTS > 1: the sum of one chunk, fp32. PARTS == 1: all chunks, rounded. PER: rows that
    share a row of x."""
    CHUNKS: tl.constexpr = (K + CHUNK - 1) // CHUNK
    pid = tl.program_id(0)
    part = pid % PARTS
    pid_r = (pid // PARTS) % tl.cdiv(R, BLOCK_R)
    pid_m = pid // (PARTS * tl.cdiv(R, BLOCK_R))
    slice_id = tl.program_id(1)
    slot, expert, row, there = _tile(
        pid_m, rows_ptr, experts_ptr, padded_ptr, mapping_ptr, slots_ptr, enabled_ptr,
        ROWS, LENGTH, BLOCKS, ACTIVE, TOP_K, SORTED, MOST, BLOCK_M,
    )  # fmt: skip
    if slot < 0:
        return
    if expert < 0:
        return
    weights = a_ptr
    if slice_id == 1:
        weights = a2_ptr
    r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    xs = x_ptr + (row // PER)[:, None].to(tl.int64) * x_row + k[None, :]
    ws = weights + slot.to(tl.int64) * a_slot + expert.to(tl.int64) * a_expert + r[None, :] * K + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    first = part * CHUNK if PARTS > 1 else 0
    last = part * CHUNK + 1 if PARTS > 1 else CHUNKS * CHUNK
    for c in range(first, last, CHUNK):
        acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for k0 in range(c, c + CHUNK, BLOCK_K):
            inside = k + k0 < K
            a = tl.load(xs + k0, mask=there[:, None] & inside[None, :], other=0.0)
            b = tl.load(ws + k0, mask=(r < R)[None, :] & inside[:, None], other=0.0)
            acc = tl.dot(a, b, acc)
        total = total + acc
    line = (slice_id.to(tl.int64) * PARTS + part) * ROWS + row.to(tl.int64)
    tl.store(
        t_ptr + line[:, None] * R + r[None, :], total.to(t_ptr.dtype.element_ty), mask=there[:, None] & (r < R)[None, :]
    )


@triton.jit(do_not_specialize=["ROWS", "LENGTH", "BLOCKS", "ACTIVE"])
def _expand(
    t_ptr, b_ptr, b2_ptr, y_ptr, w_ptr, rows_ptr, experts_ptr, padded_ptr, mapping_ptr, slots_ptr, enabled_ptr,
    ROWS, LENGTH, BLOCKS, ACTIVE, y_row, b_slot, b_expert,
    N: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr,
    SORTED: tl.constexpr, MOST: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[row, slice's columns] += w t B^T. PARTS > 1: t holds fp32 chunk sums. COLUMNS: how many a program computes."""
    pid_n = tl.program_id(0) % tl.cdiv(N, COLUMNS)
    pid_m = tl.program_id(0) // tl.cdiv(N, COLUMNS)
    slice_id = tl.program_id(1)
    slot, expert, row, there = _tile(
        pid_m, rows_ptr, experts_ptr, padded_ptr, mapping_ptr, slots_ptr, enabled_ptr,
        ROWS, LENGTH, BLOCKS, ACTIVE, TOP_K, SORTED, MOST, BLOCK_M,
    )  # fmt: skip
    if slot < 0:
        return
    if expert < 0:
        return
    weights = b_ptr
    if slice_id == 1:
        weights = b2_ptr
    r = tl.arange(0, BLOCK_R)
    line = slice_id.to(tl.int64) * PARTS * ROWS + row.to(tl.int64)
    ts = t_ptr + line[:, None] * R + r[None, :]
    weights += slot.to(tl.int64) * b_slot + expert.to(tl.int64) * b_expert
    for first in range(pid_n * COLUMNS, pid_n * COLUMNS + COLUMNS, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for r0 in range(0, R, BLOCK_R):
            inside = there[:, None] & (r + r0 < R)[None, :]
            if PARTS > 1:
                total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
                for part in tl.static_range(PARTS):
                    total += tl.load(ts + r0 + ROWS.to(tl.int64) * part * R, mask=inside, other=0.0)
                t = total.to(y_ptr.dtype.element_ty)
            else:
                t = tl.load(ts + r0, mask=inside, other=0.0)
            bs = weights + n[None, :] * R + r[:, None] + r0
            b = tl.load(bs, mask=(n < N)[None, :] & (r + r0 < R)[:, None], other=0.0)
            acc = tl.dot(t, b, acc)
        if WEIGHTED:
            acc = acc * tl.load(w_ptr + row, mask=there, other=0.0).to(tl.float32)[:, None]
        d = acc.to(y_ptr.dtype.element_ty)
        ys = y_ptr + row[:, None].to(tl.int64) * y_row + (slice_id * N + n)[None, :]
        kept = there[:, None] & (n < N)[None, :]
        y = tl.load(ys, mask=kept, other=0.0)
        tl.store(ys, (y.to(tl.float32) + d.to(tl.float32)).to(y_ptr.dtype.element_ty), mask=kept)


def expert_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    blocks: Blocks,
    weights: torch.Tensor | None,
    top_k: int,
    way: str = "",
) -> None:
    """Add every row's adapter to y [rows, columns] in place.

    x: [rows / top_k, K] or [rows, K]. a, b: one or two slices of equal shapes; the last two dimensions are dense.
    weights: fp32, one for each row, dense, or None. way: "fused" or "whole", "" to choose by rows; both give the same
    bits.
    """
    rows, (slots, experts, rank, k), n = y.shape[0], a[0].shape, b[0].shape[-2]
    slices, length = len(a), chunk(k)
    chunks = triton.cdiv(k, length)
    way = way or ("fused" if rows <= FEW else "whole")
    parts = chunks if way == "fused" else 1
    block_r = max(16, min(triton.next_power_of_2(rank), 64))
    in_order = blocks.padded is not None
    # Sorted rows of all slots lie in one tensor.
    held = blocks.mapping.new_empty(0) if blocks.rows is None else blocks.rows
    long, most = (len(held) // slots, len(blocks.experts) // slots) if in_order else (0, 0)
    tiles = rows
    if in_order:  # at most one tile of each adapter and expert is not full
        pairs = min(rows, slots * experts)
        tiles = pairs + (rows - pairs) // BLOCK_M
    # Where many programs find no tile, a program computes more.
    columns = BLOCK_N * (1 if not in_order else 4 if parts > 1 else triton.cdiv(n, BLOCK_N))
    t = torch.empty((slices, parts, rows, rank), dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
    named = (
        held, blocks.experts, blocks.padded if in_order else held, blocks.mapping, blocks.slots, blocks.enabled,
        rows, long, most, blocks.active,
    )  # fmt: skip
    shared = {"R": rank, "PARTS": parts, "TOP_K": top_k, "SORTED": in_order, "BLOCK_M": BLOCK_M, "BLOCK_R": block_r}
    shared["MOST"] = triton.next_power_of_2(blocks.active)
    _shrink[(parts * triton.cdiv(rank, block_r) * tiles, slices)](
        x, a[0], a[-1], t, *named, x.stride(0), a[0].stride(0), a[0].stride(1),
        K=k, CHUNK=length, PER=rows // x.shape[0], BLOCK_K=BLOCK_K, **shared, num_warps=4, num_stages=3,
    )  # fmt: skip
    _expand[(triton.cdiv(n, columns) * tiles, slices)](
        t, b[0], b[-1], y, t if weights is None else weights, *named, y.stride(0), b[0].stride(0), b[0].stride(1),
        N=n, WEIGHTED=weights is not None, COLUMNS=columns, BLOCK_N=BLOCK_N, **shared,
        num_warps=4, num_stages=1 if parts > 1 else 2,
    )  # fmt: skip
