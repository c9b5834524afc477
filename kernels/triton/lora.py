"""LoRA: y[i] += (x[i] A[s]^T) B[s]^T for rows i of the adapter in slot s, for several slices of y at once.

x [M, K], A [slots, R, K] and B [slots, N, R] are bf16 or fp16, y [M, sum of N] has their type. Rows are named by vLLM's
metadata: row indices sorted by slot, and for each active slot its number of rows and the first of them.

Order of one row:
- t: K is cut into chunks of `chunk(K)` elements. Each chunk has one fp32 accumulator, which starts at zero and takes K
  in ascending order. The chunk sums are added in ascending order, starting from zero, and t is rounded to the type.
- d: one fp32 accumulator takes R in ascending order; d is rounded to the type.
- y + d is rounded to the type.

The work is shared out in three ways, which give the same bits. "fused", for few rows: a program computes one chunk, and
the programs of the second product add the chunks. "split": a kernel between the two adds the chunks. "whole", for many
rows: a program computes all chunks of its rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FEW = 64  # rows up to which the second product adds the chunks
PROGRAMS = 264  # of the first product, above which each computes all chunks: two for each of Hopper's multiprocessors
BLOCK_K = 128


def chunk(k: int) -> int:
    """The length of a chunk of K: a function of K alone, so that no K has more than 16 chunks up to 16,384."""
    return 256 if k <= 4096 else 512 if k <= 8192 else 1024


@triton.jit
def _shrink(
    x_ptr, a_ptr, t_ptr, rows_ptr, counts_ptr, starts_ptr, slots_ptr,
    x_row, a_slot, a_rank, t_slice, t_part, t_row,
    K: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """t[slice, part, row, :]. PARTS > 1: the sum of one chunk, fp32. PARTS == 1: all chunks, rounded."""
    CHUNKS: tl.constexpr = (K + CHUNK - 1) // CHUNK
    pid = tl.program_id(0)
    part = pid % PARTS
    pid_r = (pid // PARTS) % tl.cdiv(R, BLOCK_R)
    pid_m = pid // (PARTS * tl.cdiv(R, BLOCK_R))
    slice_id = tl.program_id(1)
    at = tl.program_id(2)
    slot = tl.load(slots_ptr + at)
    if slot < 0:
        return
    count = tl.load(counts_ptr + at)
    if pid_m * BLOCK_M >= count:
        return
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(rows_ptr + tl.load(starts_ptr + at) + m, mask=m < count, other=0)
    r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    if SLICES == 1:
        weights = a_ptr
    else:
        weights = tl.load(a_ptr + slice_id).to(tl.pointer_type(x_ptr.dtype.element_ty))
    xs = x_ptr + row[:, None].to(tl.int64) * x_row + k[None, :]
    ws = weights + slot.to(tl.int64) * a_slot + r[None, :] * a_rank + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    first = part * CHUNK if PARTS > 1 else 0
    last = part * CHUNK + 1 if PARTS > 1 else CHUNKS * CHUNK
    for c in range(first, last, CHUNK):
        acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for k0 in range(c, c + CHUNK, BLOCK_K):
            inside = k + k0 < K
            a = tl.load(xs + k0, mask=(m < count)[:, None] & inside[None, :], other=0.0)
            b = tl.load(ws + k0, mask=(r < R)[None, :] & inside[:, None], other=0.0)
            acc = tl.dot(a, b, acc)
        total = total + acc
    out = t_ptr + slice_id.to(tl.int64) * t_slice + part.to(tl.int64) * t_part + row[:, None].to(tl.int64) * t_row
    tl.store(out + r[None, :], total.to(t_ptr.dtype.element_ty), mask=(m < count)[:, None] & (r < R)[None, :])


@triton.jit
def _sum(parts_ptr, t_ptr, size, slice_size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """t[slice, i] = the sum of parts[slice, part, i] over ascending parts, rounded, for i below `size`.

    parts is dense: a part has `size` elements, a slice has `slice_size`. Rows without an adapter hold anything.
    """
    slice_id = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = parts_ptr + slice_id * slice_size + i
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(at + part * size, mask=i < size, other=0.0)
    tl.store(t_ptr + slice_id * size + i, total.to(t_ptr.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["M"])
def _expand(
    t_ptr, b_ptr, y_ptr, M, rows_ptr, counts_ptr, starts_ptr, slots_ptr, at_ptr, sizes_ptr,
    t_slice, t_part, t_row, b_slots_ptr, y_row,
    R: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr, SAME: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[row, slice's columns] += t B^T. PARTS > 1: t holds fp32 chunk sums. SAME: at, sizes, b_slots are numbers."""
    slice_id = tl.program_id(1)
    at = tl.program_id(2)
    slot = tl.load(slots_ptr + at)
    if slot < 0:
        return
    count = tl.load(counts_ptr + at)
    m_blocks = tl.cdiv(M, BLOCK_M)
    pid_m = tl.program_id(0) % m_blocks
    pid_n = tl.program_id(0) // m_blocks
    if pid_m * BLOCK_M >= count:
        return
    if SAME:
        size = sizes_ptr
        b_slot = b_slots_ptr
    else:
        size = tl.load(sizes_ptr + slice_id)
        b_slot = tl.load(b_slots_ptr + slice_id)
    if pid_n * BLOCK_N >= size:
        return
    if SLICES == 1:
        weights = b_ptr
        begin = at_ptr
    else:
        weights = tl.load(b_ptr + slice_id).to(tl.pointer_type(y_ptr.dtype.element_ty))
        begin = tl.load(at_ptr + slice_id)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(rows_ptr + tl.load(starts_ptr + at) + m, mask=m < count, other=0)
    r = tl.arange(0, BLOCK_R)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ts = t_ptr + slice_id.to(tl.int64) * t_slice + row[:, None].to(tl.int64) * t_row + r[None, :]
    bs = weights + slot.to(tl.int64) * b_slot + n[None, :] * R + r[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r0 in range(0, R, BLOCK_R):
        inside = (m < count)[:, None] & (r + r0 < R)[None, :]
        if PARTS > 1:
            total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for part in tl.static_range(PARTS):
                total += tl.load(ts + r0 + part * t_part, mask=inside, other=0.0)
            t = total.to(y_ptr.dtype.element_ty)
        else:
            t = tl.load(ts + r0, mask=inside, other=0.0)
        b = tl.load(bs + r0, mask=(n < size)[None, :] & (r + r0 < R)[:, None], other=0.0)
        acc = tl.dot(t, b, acc)
    d = acc.to(y_ptr.dtype.element_ty)
    ys = y_ptr + row[:, None].to(tl.int64) * y_row + (begin + n)[None, :]
    kept = (m < count)[:, None] & (n < size)[None, :]
    y = tl.load(ys, mask=kept, other=0.0)
    tl.store(ys, (y.to(tl.float32) + d.to(tl.float32)).to(y_ptr.dtype.element_ty), mask=kept)


def tiles(m: int, rank: int, active: int) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int, int]]:
    """The tiles of both products, which change no bit: (M, R, warps, stages), and (M, N, R, warps, stages)."""
    small = m <= 16 * active  # on average, a slot has few rows
    wide = triton.next_power_of_2(rank)
    half = m <= FEW or (wide > 64 and m <= 512)  # more programs, where few have much to do
    shrink = (16 if small else 32 if half else 64, max(16, min(wide, 64 if small or half else 128)), 4, 3)
    return shrink, (16 if small else 64, 128, max(16, min(wide, 64)), 4, 2)


def lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a: tuple,
    b: tuple,
    rank: int,
    slices: int,
    rows: torch.Tensor,
    counts: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    active: int,
    way: str = "",
) -> None:
    """Add every row's adapter to y [M, columns] in place.

    x: [M, K], dense. a: (weights or pointers to them, stride of a slot, stride of the rank), as vLLM's _get_lora_a_ptr
    gives them. b: (first column of each slice, weights or pointers, stride of a slot, size of each slice, whether all
    slices have one size, the largest size), of vLLM's _get_lora_b_ptr. rows, counts, starts, slots: vLLM's metadata.
    active: how many slots to look at. way: "fused", "split" or "whole", "" to choose by M; all give the same bits.
    """
    m, k = x.shape
    length = chunk(k)
    chunks = triton.cdiv(k, length)
    block_m, block_r, warps, stages = tiles(m, rank, active)[0]
    blocks = triton.cdiv(rank, block_r) * triton.cdiv(m, block_m)
    way = way or ("fused" if m <= FEW else "split" if blocks * slices < PROGRAMS else "whole")
    parts = 1 if way == "whole" else chunks
    t = torch.empty((slices, parts, m, rank), dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
    weights, a_slot, a_rank = a
    _shrink[(parts * blocks, slices, active)](
        x, weights, t, rows, counts, starts, slots,
        x.stride(0), a_slot, a_rank, t.stride(0), t.stride(1), t.stride(2),
        K=k, R=rank, CHUNK=length, PARTS=parts, SLICES=slices,
        BLOCK_M=block_m, BLOCK_R=block_r, BLOCK_K=BLOCK_K, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if way == "split" and parts > 1:
        sums = torch.empty((slices, 1, m, rank), dtype=x.dtype, device=x.device)
        size = m * rank
        _sum[(triton.cdiv(size, 1024), slices)](t, sums, size, parts * size, PARTS=parts, BLOCK=1024, num_warps=4)
        t = sums
    expand(y, t, b, rank, slices, rows, counts, starts, slots, active)


def expand(
    y: torch.Tensor,
    t: torch.Tensor,
    b: tuple,
    rank: int,
    slices: int,
    rows: torch.Tensor,
    counts: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    active: int,
) -> None:
    """Add d of every row to y [M, columns] in place. t: [slices, parts, M, rank], dense; fp32 sums of chunks for
    several parts, else the rounded t in y's type. An embedding's t is a row of its adapter. The others: see `lora`.
    """
    (_, parts, m, _), (begin, weights, b_slot, sizes, same, most) = t.shape, b
    block_m, block_n, block_r, warps, stages = tiles(m, rank, active)[1]
    _expand[(triton.cdiv(m, block_m) * triton.cdiv(most, block_n), slices, active)](
        t, weights, y, m, rows, counts, starts, slots, begin, sizes,
        t.stride(0), t.stride(1), t.stride(2), b_slot, y.stride(0),
        R=rank, PARTS=parts, SLICES=slices, SAME=same,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=block_r, num_warps=warps, num_stages=1 if parts > 1 else stages,
    )  # fmt: skip
