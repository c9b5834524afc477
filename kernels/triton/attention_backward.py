"""Gradients of causal attention over packed sequences, from q, k, v, the output o, its lse and the output's gradient.

q, o, do, dq [T, H, D]; k, v, dk, dv [T, G, D], of one dtype: bf16, fp16 or fp32. lse [H, T] fp32: natural logarithms.
Sequence s holds the rows starts[s] to starts[s + 1]. Each H / G neighbouring query heads share a KV head. Optional: a
window (a query sees that many keys, its own included), and a soft cap (a score becomes cap * tanh(score / cap)).

Order: tiles start at each sequence's first token, and each sum has one fp32 accumulator.
- delta of a row is the sum of its D products of o and do, added by one program.
- dk and dv of a block of keys: the query heads of the group ascending; within a head, the blocks of queries that see a
  key of the block, ascending, with one matrix product for each. The scale is applied at the end.
- dq of a block of queries: the blocks of keys that a query of the block sees, ascending.
- Weights and the gradients of scores are rounded to the dtype before a product. A result is rounded once.
No two programs add to one number. So the bits of a sequence's gradients depend on this sequence, the tile and the
device. They do not depend on packing, padding, neighbours or the number of sequences.

The weights are computed again: exp2(score * scale * log2(e) - lse * log2(e)). A row past the sequence's end has an lse
of infinity, so its weights are zero.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
# lse and delta are copied, with each sequence padded to a multiple of this, so that loads need no mask.
_PAD = tl.constexpr(128)
_ELEMENTS = 8192  # of o, for each program of _rows


class Tile(NamedTuple):
    """Block sizes and launch options of one kernel.

    split: blocks that need no mask run in a loop of their own. level: the blocks with the most work of all heads and
    sequences run first, so that programs end together; else the blocks of one head run together and share the L2 cache.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    split: bool = False
    level: bool = False


class Tiles(NamedTuple):
    """for_keys: the tile of dk and dv. for_queries: the tile of dq. shared: bytes of shared memory for either."""

    for_keys: Tile
    for_queries: Tile
    shared: int


# By (head size rounded up to a power of two, bytes an element): tiles in order of preference. The first that fits into
# the device's shared memory serves. The first of each list is for Hopper, whose matrix instructions take 64 rows for
# every four warps.
TILES: dict[tuple[int, int], tuple[Tiles, ...]] = {
    (64, 2): (Tiles(Tile(64, 64, 4, 3, level=True), Tile(128, 64, 8, 3, split=True), 81920),),
    (128, 2): (
        Tiles(Tile(64, 64, 4, 2, level=True), Tile(64, 64, 4, 2, split=True), 99328),
        Tiles(Tile(32, 64, 4, 1), Tile(64, 32, 4, 1), 57344),
    ),
    (256, 2): (
        Tiles(Tile(32, 64, 8, 1), Tile(64, 32, 8, 1), 114688),
        Tiles(Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), 57344),
    ),
    (64, 4): (Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), 36864),),
    (128, 4): (Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), 69632),),
    (256, 4): (Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), 66560),),
}
# The size of a small head is rounded up to this.
_SMALLEST = 64


@triton.jit
def _place(LEVEL: tl.constexpr):
    """(block, head, sequence) of this program."""
    if LEVEL:
        return tl.program_id(2), tl.program_id(0), tl.program_id(1)
    else:
        return tl.program_id(0), tl.program_id(1), tl.program_id(2)


def _grid(tile: Tile, blocks: int, heads: int, sequences: int) -> tuple[int, int, int]:
    return (heads, sequences, blocks) if tile.level else (blocks, heads, sequences)


@triton.jit
def _padded(start, sequence):
    """Where a sequence's rows begin in lse2 and delta: at a multiple of _PAD, with room for whole blocks of _PAD."""
    return (start + sequence * _PAD) // _PAD * _PAD


@triton.jit(do_not_specialize=["stride_lse"])
def _rows(
    o,
    do,
    lse,
    lse2,
    delta,
    starts,
    stride_o,
    stride_do,
    stride_lse,
    stride_rows,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """For a block of rows of one head: lse in base 2, and delta. Past the sequence's end: infinity and 0."""
    start = tl.load(starts + tl.program_id(2))
    length = tl.load(starts + tl.program_id(2) + 1) - start
    first = tl.program_id(0) * ROWS
    if first >= tl.cdiv(length, _PAD) * _PAD:
        return
    head = tl.program_id(1).to(tl.int64)
    at = first + tl.arange(0, ROWS)
    a = _tile(o + start.to(tl.int64) * stride_o + head * D, at, length, stride_o, D, WIDTH).to(tl.float32)
    b = _tile(do + start.to(tl.int64) * stride_do + head * D, at, length, stride_do, D, WIDTH).to(tl.float32)
    to = head * stride_rows + _padded(start, tl.program_id(2)) + at
    tl.store(delta + to, tl.sum(a * b, axis=1))
    logs = tl.load(lse + head * stride_lse + start + at, mask=at < length, other=float("inf"))
    tl.store(lse2 + to, logs * _LOG2E)


@triton.jit
def _tile(base, at, length, stride, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `at` of a sequence, [rows, WIDTH]; zeros past the sequence's end and past D."""
    d = tl.arange(0, WIDTH)
    inside = (at < length)[:, None]
    if D != WIDTH:
        inside = inside & (d < D)[None, :]
    return tl.load(base + at[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def _weights(scores, lse2, scale, cap, HAS_CAP: tl.constexpr):
    """(softmax weights, factor of the scores' gradient) of raw scores; lse2 broadcasts against the scores."""
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        tanh = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * _LOG2E * scale / cap)) + 1.0)
        return tl.exp2(tanh * (cap * _LOG2E) - lse2), 1.0 - tanh * tanh
    else:
        return tl.exp2(scores * (scale * _LOG2E) - lse2), 1.0


@triton.jit
def _seen(query, key, window, HAS_WINDOW: tl.constexpr):
    """Whether each query sees each key; the positions broadcast."""
    seen = query >= key
    if HAS_WINDOW:
        seen = seen & (query - key < window)
    return seen


@triton.jit
def _add_queries(
    dk, dv, k, v, q, do, lse2, delta, at, key, length, stride_q, stride_do, scale, cap, window,
    D: tl.constexpr, WIDTH: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk and dv plus what the queries at positions `at` give."""
    queries = _tile(q, at, length, stride_q, D, WIDTH)
    row_lse = tl.load(lse2 + at)
    scores = tl.dot(k, tl.trans(queries), input_precision="ieee")
    weights, slope = _weights(scores, row_lse[None, :], scale, cap, HAS_CAP)
    if MASKED:
        weights = tl.where(_seen(at[None, :], key[:, None], window, HAS_WINDOW), weights, 0.0)
    grads = _tile(do, at, length, stride_do, D, WIDTH)
    dv = tl.dot(weights.to(grads.dtype), grads, dv, input_precision="ieee")
    row_delta = tl.load(delta + at)
    dweights = tl.dot(v, tl.trans(grads), input_precision="ieee")
    dscores = weights * (dweights - row_delta[None, :])
    if HAS_CAP:
        dscores = dscores * slope
    dk = tl.dot(dscores.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["window"])
def _for_keys(
    q, k, v, do, lse2, delta, dk, dv, starts,
    scale, cap, window, stride_q, stride_k, stride_v, stride_do, stride_rows, stride_dk, stride_dv,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, LEVEL: tl.constexpr,
):  # fmt: skip
    """One block of keys of one KV head. The first blocks have the most queries and run first."""
    block, head, sequence = _place(LEVEL)
    start = tl.load(starts + sequence)
    length = tl.load(starts + sequence + 1) - start
    first = block * KEYS
    if first >= length:
        return
    row = start.to(tl.int64)
    key = first + tl.arange(0, KEYS)
    held_k = _tile(k + row * stride_k + head * D, key, length, stride_k, D, WIDTH)
    held_v = _tile(v + row * stride_v + head * D, key, length, stride_v, D, WIDTH)
    q += row * stride_q + head * (GROUP * D)
    do += row * stride_do + head * (GROUP * D)
    rows = head.to(tl.int64) * GROUP * stride_rows + _padded(start, sequence)
    lse2 += rows
    delta += rows
    sum_k = tl.zeros((KEYS, WIDTH), tl.float32)
    sum_v = tl.zeros((KEYS, WIDTH), tl.float32)
    # Blocks of queries start at position 0, whatever the block of keys.
    low = first // QUERIES * QUERIES
    high = length
    if HAS_WINDOW:
        high = tl.minimum(length, first + KEYS + window - 1)
    offset = tl.arange(0, QUERIES)
    if SPLIT:
        # Queries from `open` on see every key of the block.
        open = high if HAS_WINDOW else tl.minimum(tl.cdiv(first + KEYS, QUERIES) * QUERIES, length)
        for member in range(GROUP):
            for at in range(low, open, QUERIES):
                sum_k, sum_v = _add_queries(
                    sum_k, sum_v, held_k, held_v, q + member * D, do + member * D, lse2 + member * stride_rows,
                    delta + member * stride_rows, at + offset, key, length, stride_q, stride_do, scale, cap, window,
                    D, WIDTH, HAS_CAP, HAS_WINDOW, True,
                )  # fmt: skip
            for at in range(open, high, QUERIES):
                sum_k, sum_v = _add_queries(
                    sum_k, sum_v, held_k, held_v, q + member * D, do + member * D, lse2 + member * stride_rows,
                    delta + member * stride_rows, at + offset, key, length, stride_q, stride_do, scale, cap, window,
                    D, WIDTH, HAS_CAP, HAS_WINDOW, False,
                )  # fmt: skip
    else:
        # One loop over heads and blocks, so that loads run ahead from one head into the next.
        blocks = tl.cdiv(high - low, QUERIES)
        for step in range(GROUP * blocks):
            member = step // blocks
            at = low + (step - member * blocks) * QUERIES
            sum_k, sum_v = _add_queries(
                sum_k, sum_v, held_k, held_v, q + member * D, do + member * D, lse2 + member * stride_rows,
                delta + member * stride_rows, at + offset, key, length, stride_q, stride_do, scale, cap, window,
                D, WIDTH, HAS_CAP, HAS_WINDOW, True,
            )  # fmt: skip
    d = tl.arange(0, WIDTH)
    inside = (key < length)[:, None] & (d < D)[None, :]
    to = key[:, None] * stride_dk + d[None, :]
    tl.store(dk + row * stride_dk + head * D + to, (sum_k * scale).to(dk.dtype.element_ty), mask=inside)
    to = key[:, None] * stride_dv + d[None, :]
    tl.store(dv + row * stride_dv + head * D + to, sum_v.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _add_keys(
    dq, q, do, k, v, row_lse, row_delta, query, at, length, stride_k, stride_v, scale, cap, window,
    D: tl.constexpr, WIDTH: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq plus what the keys at positions `at` give."""
    keys = _tile(k, at, length, stride_k, D, WIDTH)
    values = _tile(v, at, length, stride_v, D, WIDTH)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
    weights, slope = _weights(scores, row_lse[:, None], scale, cap, HAS_CAP)
    if MASKED:
        weights = tl.where(_seen(query[:, None], at[None, :], window, HAS_WINDOW), weights, 0.0)
    dweights = tl.dot(do, tl.trans(values), input_precision="ieee")
    dscores = weights * (dweights - row_delta[:, None])
    if HAS_CAP:
        dscores = dscores * slope
    return tl.dot(dscores.to(keys.dtype), keys, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["blocks", "window"])
def _for_queries(
    q, k, v, do, lse2, delta, dq, starts, blocks,
    scale, cap, window, stride_q, stride_k, stride_v, stride_do, stride_rows, stride_dq,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, LEVEL: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head. The last blocks have the most keys and run first. blocks: of the grid."""
    block, head, sequence = _place(LEVEL)
    start = tl.load(starts + sequence)
    length = tl.load(starts + sequence + 1) - start
    first = (blocks - 1 - block) * QUERIES
    if first >= length:
        return
    row = start.to(tl.int64)
    query = first + tl.arange(0, QUERIES)
    held_q = _tile(q + row * stride_q + head * D, query, length, stride_q, D, WIDTH)
    held_do = _tile(do + row * stride_do + head * D, query, length, stride_do, D, WIDTH)
    rows = head.to(tl.int64) * stride_rows + _padded(start, sequence) + query
    row_lse = tl.load(lse2 + rows)
    row_delta = tl.load(delta + rows)
    k += row * stride_k + head // GROUP * D
    v += row * stride_v + head // GROUP * D
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(first - window + 1, 0) // KEYS * KEYS
    high = tl.minimum(first + QUERIES, length)
    total = tl.zeros((QUERIES, WIDTH), tl.float32)
    offset = tl.arange(0, KEYS)
    open = low
    if SPLIT and not HAS_WINDOW:
        # Every query of the block sees the keys before `open`.
        open = (first + 1) // KEYS * KEYS
        for at in range(low, open, KEYS):
            total = _add_keys(
                total, held_q, held_do, k, v, row_lse, row_delta, query, at + offset, length, stride_k, stride_v,
                scale, cap, window, D, WIDTH, HAS_CAP, HAS_WINDOW, False,
            )  # fmt: skip
    for at in range(open, high, KEYS):
        total = _add_keys(
            total, held_q, held_do, k, v, row_lse, row_delta, query, at + offset, length, stride_k, stride_v,
            scale, cap, window, D, WIDTH, HAS_CAP, HAS_WINDOW, True,
        )  # fmt: skip
    d = tl.arange(0, WIDTH)
    to = query[:, None] * stride_dq + d[None, :]
    inside = (query < length)[:, None] & (d < D)[None, :]
    tl.store(dq + row * stride_dq + head * D + to, (total * scale).to(dq.dtype.element_ty), mask=inside)


def choose(head_size: int, element_size: int, shared: int) -> Tiles:
    """The tiles for heads of head_size elements. shared: bytes of shared memory that a block may use.

    Raises ValueError for a head size without tiles.
    """
    width = max(_SMALLEST, triton.next_power_of_2(head_size))
    if (width, element_size) not in TILES or head_size % 16:
        raise ValueError(f"attention_backward: no tiles for heads of {head_size} elements of {element_size} bytes")
    held = TILES[width, element_size]
    return next((tiles for tiles in held if tiles.shared <= shared), held[-1])


def covers(head_size: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take heads of head_size elements of dtype."""
    floats = (torch.bfloat16, torch.float16, torch.float32)
    return dtype in floats and head_size % 16 == 0 and 0 < head_size <= 256


def _packed(x: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] with packed, aligned rows: Triton would compile other loads for other tensors."""
    row = x.shape[1] * x.shape[2]
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0
    if x.stride(2) == 1 and x.stride(1) == x.shape[2] and x.stride(0) >= row and aligned:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None = None,
    cap: float = 0.0,
    tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq [T, H, D], dk [T, G, D], dv [T, G, D]), contiguous, in q's dtype.

    q, o, do [T, H, D]; k, v [T, G, D], of one dtype; lse [H, T] fp32. starts: [sequences + 1] int32, ascending from 0
    to T. longest: the longest sequence, or more. window: keys that a query sees, None for all. cap: 0 for none. tiles:
    None for the table's. Raises ValueError for shapes and dtypes that the kernels do not take.
    """
    tokens, heads, size = q.shape
    key_heads = k.shape[1]
    if not covers(size, q.dtype) or any(x.dtype != q.dtype for x in (k, v, o, do)):
        raise ValueError(f"attention_backward: heads of {size} elements, dtypes {[x.dtype for x in (q, k, v, o, do)]}")
    if v.shape != k.shape or k.shape[2] != size or heads % key_heads or not q.shape == o.shape == do.shape:
        raise ValueError(f"attention_backward: q {q.shape}, k {k.shape}, v {v.shape}, o {o.shape}, do {do.shape}")
    if lse.shape != (heads, tokens) or lse.dtype != torch.float32 or lse.stride(1) != 1:
        raise ValueError(f"attention_backward: lse {lse.shape} {lse.dtype}, not ({heads}, {tokens}) of fp32")
    if window is not None and window < 1:
        raise ValueError(f"attention_backward: a window of {window} keys")
    dq, dk, dv = torch.empty_like(q, memory_format=torch.contiguous_format), k.new_empty(k.shape), v.new_empty(v.shape)
    sequences = len(starts) - 1
    if not tokens or sequences < 1:
        return dq, dk, dv
    q, k, v, o, do = map(_packed, (q, k, v, o, do))
    if tiles is None:
        tiles = choose(size, q.element_size(), _shared_memory(q.device))
    width = max(_SMALLEST, triton.next_power_of_2(size))
    padded = (tokens // _PAD.value + sequences + 1) * _PAD.value
    lse2, delta = torch.empty((2, heads, padded), dtype=torch.float32, device=q.device)
    block = _ELEMENTS // width
    _rows[(triton.cdiv(longest, _PAD.value) * (_PAD.value // block), heads, sequences)](
        o, do, lse, lse2, delta, starts, o.stride(0), do.stride(0), lse.stride(0), padded,
        D=size, WIDTH=width, ROWS=block, num_warps=8,
    )  # fmt: skip
    shared = {
        "GROUP": heads // key_heads, "D": size, "WIDTH": width, "HAS_CAP": cap > 0, "HAS_WINDOW": window is not None
    }  # fmt: skip
    scalars = (scale, cap, window or 0)
    strides = (q.stride(0), k.stride(0), v.stride(0), do.stride(0), padded)
    tile = tiles.for_keys
    _for_keys[_grid(tile, triton.cdiv(longest, tile.keys), key_heads, sequences)](
        q, k, v, do, lse2, delta, dk, dv, starts, *scalars, *strides, dk.stride(0), dv.stride(0), **shared,
        QUERIES=tile.queries, KEYS=tile.keys, SPLIT=tile.split, LEVEL=tile.level,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = tiles.for_queries
    blocks = triton.cdiv(longest, tile.queries)
    _for_queries[_grid(tile, blocks, heads, sequences)](
        q, k, v, do, lse2, delta, dq, starts, blocks, *scalars, *strides, dq.stride(0), **shared,
        QUERIES=tile.queries, KEYS=tile.keys, SPLIT=tile.split, LEVEL=tile.level,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dq, dk, dv


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may use."""
    if device.type != "cuda":
        return 1 << 30  # Triton's interpreter
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
