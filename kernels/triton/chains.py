"""Gradients of a weight by the sequences of a batch, added to fp32 buffers (chains) sequence after sequence.

Sequence s has the rows edges[s, 0] to edges[s, 1]. Its own gradient has fp32 accumulators that begin at 0. It is then
added to the chain in one fp32 addition for each element, and the next sequence follows. So one launch for a batch adds
the same numbers in the same order as launches for its parts, one after the other, in the order of the sequences.

Order within a sequence:
- `products`: chain [N, K] gets grad [R, N].T @ x [R, K]. One program has a tile of the chain, whose size N and K alone
  decide. It multiplies _ROWS rows at a time, ascending from the sequence's first row, in one accumulator.
- `norms`: chain [C] gets the gradient of RMSNorm's weight, sum over r of g[r] * n[r], with n = x * rsqrt(mean(x^2) +
  eps). A block is _STEPS * ROWS rows of one sequence, from its first row. Lane i of ROWS lanes adds rows i, i + ROWS,
  ... of a block, ascending; then the lanes are summed. The blocks are added ascending.
- `sums`: chain [N] gets the sum of grad's rows. Lane i of _LANES adds rows i, i + _LANES, ...; the lanes are summed.
"""

import functools

import torch
import triton
import triton.language as tl

_ROWS = tl.constexpr(64)
_STEPS = tl.constexpr(32)
_LANES = tl.constexpr(32)
_WIDEST = 16384
_SMALL = 132 * 128 * 128  # elements of a chain: with fewer, large tiles leave processors idle
_EVERY = 64  # columns of a program of `norms` and `sums`

Spans = tuple[tuple[int, int], ...]


@triton.jit(do_not_specialize=["sequences"])
def _products(grad, x, chain, edges, sequences, n_size, k_size, N: tl.constexpr, K: tl.constexpr):
    n = tl.program_id(1) * N + tl.arange(0, N)
    k = tl.program_id(0) * K + tl.arange(0, K)
    to = n.to(tl.int64)[:, None] * k_size + k[None, :]
    inside = (n < n_size)[:, None] & (k < k_size)[None, :]
    total = tl.load(chain + to, mask=inside, other=0.0)
    row = tl.arange(0, _ROWS)
    for s in range(sequences):
        last = tl.load(edges + 2 * s + 1)
        own = tl.zeros((N, K), tl.float32)
        for at in range(tl.load(edges + 2 * s), last, _ROWS):
            r = (at + row).to(tl.int64)[:, None]
            real = r < last
            left = tl.load(grad + r * n_size + n[None, :], mask=real & (n < n_size)[None, :], other=0.0)
            right = tl.load(x + r * k_size + k[None, :], mask=real & (k < k_size)[None, :], other=0.0)
            own = tl.dot(tl.trans(left), right, own, input_precision="ieee")
        total += own
    tl.store(chain + to, total, mask=inside)


@triton.jit
def _norms(x, g, parts, blocks, cols, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The gradient of one block of rows: parts [blocks, cols]."""
    c = tl.arange(0, BLOCK)
    inside = c < cols
    first = tl.load(blocks + 2 * tl.program_id(0))
    last = tl.load(blocks + 2 * tl.program_id(0) + 1)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for at in range(first, last, ROWS):
        r = (at + tl.arange(0, ROWS)).to(tl.int64)
        place = r[:, None] * cols + c[None, :]
        mask = (r < last)[:, None] & inside[None, :]
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(g + place, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / cols + eps)[:, None]
        total += grad * (value * scale)
    tl.store(parts + tl.program_id(0).to(tl.int64) * cols + c, tl.sum(total, axis=0), mask=inside)


@triton.jit(do_not_specialize=["sequences"])
def _fold(parts, chain, edges, sequences, cols, BLOCK: tl.constexpr):
    """Add the parts edges[s, 0] to edges[s, 1] of each sequence, then their sum to the chain."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < cols
    total = tl.load(chain + c, mask=inside, other=0.0)
    for s in range(sequences):
        own = tl.zeros((BLOCK,), tl.float32)
        for part in range(tl.load(edges + 2 * s), tl.load(edges + 2 * s + 1)):
            own += tl.load(parts + part * cols + c, mask=inside, other=0.0)
        total += own
    tl.store(chain + c, total, mask=inside)


@triton.jit(do_not_specialize=["sequences"])
def _sums(grad, chain, edges, sequences, cols, BLOCK: tl.constexpr):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < cols
    total = tl.load(chain + c, mask=inside, other=0.0)
    for s in range(sequences):
        last = tl.load(edges + 2 * s + 1)
        own = tl.zeros((_LANES, BLOCK), tl.float32)
        for at in range(tl.load(edges + 2 * s), last, _LANES):
            r = (at + tl.arange(0, _LANES)).to(tl.int64)
            mask = (r < last)[:, None] & inside[None, :]
            own += tl.load(grad + r[:, None] * cols + c[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(own, axis=0)
    tl.store(chain + c, total, mask=inside)


def products(grad: torch.Tensor, x: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    """Add grad.T @ x of each sequence to chain [N, K] fp32, contiguous, in place. grad: [R, N]. x: [R, K].

    grad and x have one dtype, bf16, fp16 or fp32, whose products are exact in fp32 or rounded once. spans: the first
    row of each sequence, and the row after its last; the order of the additions.
    """
    grad, x = _aligned(grad), _aligned(x)
    n, k = chain.shape
    size, warps = tile(n, k)
    _products[(triton.cdiv(k, size), triton.cdiv(n, size))](
        grad, x, chain, _table(spans, x.device), len(spans), n, k, size, size, num_warps=warps, num_stages=3
    )


def tile(n: int, k: int) -> tuple[int, int]:
    """The sides of a tile of a chain [n, k], and the warps that have it."""
    return (64, 4) if n * k < _SMALL else (128, 8)


def norms(grad: torch.Tensor, x: torch.Tensor, eps: float, spans: Spans, chain: torch.Tensor) -> None:
    """Add the gradient of RMSNorm's weight of each sequence to chain [C] fp32 in place. grad, x: [R, C], C <= 16384.

    Raises ValueError for longer rows.
    """
    cols = x.shape[1]
    if cols > _WIDEST:
        raise ValueError(f"chains: rows of {cols} elements, more than {_WIDEST}")
    block = max(16, triton.next_power_of_2(cols))
    together = max(1, 2048 // block)
    blocks, edges = _blocks(spans, together * _STEPS.value)
    if not blocks:
        return
    grad, x = _aligned(grad), _aligned(x)
    parts = torch.empty((len(blocks), cols), dtype=torch.float32, device=x.device)
    warps = max(1, min(16, block * together // 512))
    _norms[(len(blocks),)](x, grad, parts, _table(blocks, x.device), cols, eps, block, together, num_warps=warps)
    _fold[(triton.cdiv(cols, _EVERY),)](parts, chain, _table(edges, x.device), len(edges), cols, _EVERY, num_warps=2)


def sums(grad: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    """Add the sum of each sequence's rows of grad [R, N] to chain [N] fp32 in place."""
    grad = _aligned(grad)
    cols = grad.shape[1]
    _sums[(triton.cdiv(cols, _EVERY),)](grad, chain, _table(spans, grad.device), len(spans), cols, _EVERY, num_warps=4)


@functools.lru_cache(maxsize=64)
def _table(spans: Spans, device: torch.device) -> torch.Tensor:
    """spans on the device: [spans, 2] int32. All layers of a pass ask for the same."""
    return torch.tensor(spans, dtype=torch.int32).view(-1, 2).to(device)


@functools.lru_cache(maxsize=64)
def _blocks(spans: Spans, rows: int) -> tuple[Spans, Spans]:
    """Blocks of up to `rows` rows of one sequence each; and of each sequence its first block, and the one after."""
    blocks, edges = [], []
    for first, last in spans:
        begin = len(blocks)
        blocks += [(at, min(at + rows, last)) for at in range(first, last, rows)]
        edges.append((begin, len(blocks)))
    return tuple(blocks), tuple(edges)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, contiguous and aligned: Triton would compile other loads, and other sums, for another x."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
