"""Tiles of the Triton experts on CUDA: chosen by the number of tokens, without split-K, certified against a fixed tile.

Order: each expert's two products run over ascending K, in one pass, with one fp32 accumulator. A token's experts are
then summed in the order of the token's top-k list. A tile changes neither order, provided that the device's matrix
instructions add in one order in every tile. The certificate tests this.

As for linears, rounding to 16 bits hides most other orders. So the sums in the `up` half of the first product are
exactly zero, and their outputs are only rounding errors. In half of the sums of the second product, these rounding
errors cancel again.

Experts with 8-bit floats in blocks sum each group of 128 elements of K on the tensor cores. Each group's sum is
multiplied by its two scales, then added; on Hopper by a bundled kernel (kernels/triton/block_experts.py). Experts with
a scale for each row or for each expert sum all of K there, and multiply once, first by the scale of activations. So the
tile may decide which operand the tensor cores take first. Plain random data are compared: the tensor cores' short sums
show another order by themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bi_patch.ops import bits, certificates
from bi_patch.ops.certificates import Certificate, Key, Tally
from bi_patch.ops.cuda import machine
from bi_patch.ops.cuda.ahead import Ahead
from bi_patch.ops.zero_sums import cancelling

if TYPE_CHECKING:
    import torch

OPERATION = "cuda.moe"
DATA = "sums of zero and others"
# The tile of upstream's mode. Every other tile is compared with FIXED, and FIXED serves if another tile differs.
FIXED = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 8, "SPLIT_K": 1}
# For 8-bit floats with a scale for each group: the same, with K blocks of one group.
FIXED_GROUPS = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 8, "SPLIT_K": 1}
FP8 = "fp8_w8a8"  # vLLM's name of the kind of weights
# On Hopper, for 8-bit floats without groups, in place of vLLM's default tiles of 64 and 128 rows: FEW, or MANY if an
# expert has at least MANY_ROWS rows on average. vLLM's defaults have eight warps for 128 columns, which are too many.
# That of 128 rows takes about 1.5 times as long.
FEW = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "SPLIT_K": 1}
FEW |= {"num_warps": 4, "num_stages": 3}
MANY = FEW | {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 256, "num_warps": 8, "num_stages": 4}
MANY_ROWS = 64
# On Hopper, for groups, in place of vLLM's default tile of 64 rows: if an expert has at most so many rows on average.
# With fewer rows than a tile has, the tensor cores compute rows that nobody reads. More rows keep vLLM's default.
_COMMON = {"BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 16, "SPLIT_K": 1, "num_warps": 4}
GROUPS = {
    16: _COMMON | {"BLOCK_SIZE_M": 16, "num_stages": 3},
    128: _COMMON | {"BLOCK_SIZE_M": 64, "num_stages": 4},
}
ROW, EXPERT, EXPERT_AND_ROW = "row", "expert", "expert and row"
# By table key: whether every certificate of this size passed. A size that is not here has none, and FIXED serves it.
_passed: dict[tuple[int, int, str | None], bool] = {}
_done: set[Problem] = set()
Kinds = dict[tuple[tuple[str, int], ...], list[int]]  # by tile, sorted by name: the M that it serves, ascending
_known: dict[tuple[Problem, int, str], tuple[Kinds, Key]] = {}
_TABLES = Path(__file__).resolve().parent / "tables"


class Problem(NamedTuple):
    """One kind of experts: w13 [experts, 2 * n, hidden], w2 [experts, hidden, n], top_k experts per token.

    activation: vLLM's name of the gated activation. bias: both products add a bias. weighted_input: a token's weight
    multiplies the experts' input instead of their output. group: 128 for weights of 8-bit floats with a scale for each
    block of 128 x 128, and one for each 128 elements of a row; else 0. scale: ROW for weights of 8-bit floats with a
    scale for each of their rows, and one for each row of activations; EXPERT for one for each expert, and one for all
    activations, which the checkpoint has; EXPERT_AND_ROW for one for each expert, and one for each row of activations.
    Weights are of dtype if neither is given.
    """

    experts: int
    n: int
    hidden: int
    top_k: int
    dtype: torch.dtype
    activation: str = "silu"
    bias: bool = False
    weighted_input: bool = False
    group: int = 0
    scale: str = ""

    def __str__(self) -> str:
        whole = f" e4m3 by {self.scale}, swapped by tile" if self.scale else ""
        eighth = f" e4m3 groups of {self.group}" if self.group else whole
        extras = f"{' bias' * self.bias}{' weighted input' * self.weighted_input}{eighth}"
        size = f"E={self.experts} N={self.n} K={self.hidden} top{self.top_k}"
        return f"{size} {self.activation}{extras} {machine.name(self.dtype)}"

    @property
    def table(self) -> tuple[int, int, str | None]:
        """The key by which vLLM looks up tiles: experts, n, name of the dtype (None for bf16 and fp16)."""
        return self.experts, self.n, FP8 if self.eighth else "float32" if self.dtype.itemsize == 4 else None

    @property
    def eighth(self) -> bool:
        """Whether weights are 8-bit floats."""
        return bool(self.group or self.scale)

    @property
    def fixed(self) -> dict[str, int]:
        return FIXED_GROUPS if self.group else FIXED


class Kernel(NamedTuple):
    """vLLM's kernel for one kind of experts, with the activation and the bias of this kind.

    run: (x [M, hidden], w13, w2, weights [M, top_k] fp32, ids [M, top_k] int32) -> [M, hidden]. For 8-bit floats, w13
    and w2 are pairs with their scales in fp32: [experts, rows / group, columns / group], [experts, rows, 1] for ROW, or
    [experts]. choose: M -> the tile that serves. override: a context manager in which every call takes the
    given tile.
    """

    run: Callable[..., torch.Tensor]
    choose: Callable[[int], dict[str, int]]
    override: Callable[[dict[str, int]], Any]


def one_pass(tile: dict[str, int], dtype: str | None = None, group: int = 0) -> dict[str, int]:
    """`tile` without split-K. dtype: vLLM's name of the kind of weights. The columns of 8-bit floats fill Hopper's
    instructions. A K block of groups is one group, and a tile's columns have one scale for each group."""
    kept = {**tile, "SPLIT_K": 1}
    if dtype != FP8:
        return kept
    kept["BLOCK_SIZE_N"] = max(kept["BLOCK_SIZE_N"], 64)
    return kept | {"BLOCK_SIZE_N": min(kept["BLOCK_SIZE_N"], group), "BLOCK_SIZE_K": group} if group else kept


def tuned(tile: dict[str, int], rows: float, dtype: str | None, group: int = 0) -> dict[str, int]:
    """vLLM's default `tile`, or FEW, MANY or one of GROUPS. rows: how many an expert has on average. dtype, group: as
    for `one_pass`."""
    if dtype != FP8 or tile["BLOCK_SIZE_M"] < FEW["BLOCK_SIZE_M"] or not machine.is_hopper():
        return tile
    if group:
        return next((dict(held) for most, held in GROUPS.items() if rows <= most), tile)
    return dict(MANY if rows >= MANY_ROWS else FEW)


def is_fixed(experts: int, n: int, dtype: str | None) -> bool:
    """Whether only FIXED may serve this size: it has no certificate, or a certificate failed."""
    return not _passed.get((experts, n, dtype), False)


def bundled_table(experts: int, n: int, dtype: str | None, group: int = 0) -> dict[int, dict[str, int]] | None:
    """bi_patch's own tuned tiles for this device, by number of tokens; None if bi_patch has no table for this size.

    dtype, group: as for `one_pass`.
    """
    model = machine.device().split(" sm_")[0].replace(" ", "_")
    kind = (f"-{dtype}" if dtype else "") + (f"-{group}" if group else "")
    file = _TABLES / f"moe-{model}-E{experts}-N{n}{kind}.json"
    if not file.is_file():
        return None
    return {int(m): tile for m, tile in json.loads(file.read_text()).items()}


def certify(problem: Problem, kernel: Kernel, max_rows: int, library: str, cache: Path) -> Certificate | None:
    """Compare every tile that serves some M up to max_rows with FIXED. If the certificate fails, FIXED serves the size.

    library: the version of the kernel's library. cache: the folder of certificates. Returns None for a problem that
    this process has certified before, and for a size of which another certificate failed.
    """
    if problem in _done:
        return None
    _done.add(problem)
    if not _passed.get(problem.table, True):
        return None
    passed = False
    try:
        with _every_tile(problem):
            kinds, key = _asked(problem, kernel, max_rows, library)
            certificate = certificates.obtain(
                cache, key, lambda: _certify(problem, kernel, kinds, key), instead="the fixed tile"
            )
        passed = certificate.passed
    finally:
        _passed[problem.table] = passed
    return certificate


def rehearse(problem: Problem, kernel: Kernel, max_rows: int, library: str, cache: Path, ahead: Ahead) -> None:
    """Compile ahead what `certify` will launch. Does nothing if `cache` has the certificate."""
    if problem in _done or not _passed.get(problem.table, True):
        return
    with _every_tile(problem):
        kinds, key = _asked(problem, kernel, max_rows, library)
        if certificates.load(cache, key) is None:
            ahead.rehearse(lambda: _rehearse(problem, kernel, _tested(kinds)))


@contextmanager
def _every_tile(problem: Problem) -> Iterator[None]:
    """Let every tile serve a size, while its tiles are compared."""
    held = _passed.get(problem.table)
    _passed[problem.table] = True
    try:
        yield
    finally:
        if held is None:
            del _passed[problem.table]
        else:
            _passed[problem.table] = held


def _asked(problem: Problem, kernel: Kernel, max_rows: int, library: str) -> tuple[Kinds, Key]:
    """The M that each tile serves, and the certificate's key, which names the tiles."""
    asked = problem, max_rows, library
    if asked not in _known:
        kinds: Kinds = {}
        last, rows = None, []
        for m in range(1, max_rows + 1):
            if (tile := kernel.choose(m)) != last:  # neighbours mostly have one tile, and every start asks for each M
                last, rows = tile, kinds.setdefault(tuple(sorted(tile.items())), [])
            rows.append(m)
        tiles = json.dumps({min(rows): dict(tile) for tile, rows in kinds.items()}, sort_keys=True)
        operands, libraries = f"{problem} M<={max_rows} {tiles}", f"{library} {machine.libraries()}"
        _known[asked] = kinds, Key(OPERATION, operands, machine.device(), libraries, machine.kernels_digest(), DATA)
    return _known[asked]


def _tested(kinds: Kinds) -> list[int]:
    """The M that are compared: the first and the last of each tile, up to 4096."""
    return sorted({m for rows in kinds.values() for m in (rows[0], min(rows[-1], 4096)) if m in rows or m == 4096})


def _rehearse(problem: Problem, kernel: Kernel, tested: list[int]) -> None:
    import torch

    def zeros(*sizes: int, dtype=problem.dtype) -> torch.Tensor:
        return torch.zeros(sizes, dtype=dtype, device="cuda")

    w13 = _for_each(problem, zeros(2 * problem.n, problem.hidden))
    w2 = _for_each(problem, zeros(problem.hidden, problem.n))
    for m in tested:
        given = zeros(m, problem.hidden), w13, w2, zeros(m, problem.top_k, dtype=torch.float32)
        ids = torch.arange(problem.top_k, dtype=torch.int32, device="cuda").repeat(m, 1)
        kernel.run(*given, ids)
    with kernel.override(problem.fixed):
        kernel.run(*given, ids)


def _for_each(problem: Problem, weight: torch.Tensor, generator: torch.Generator | None = None):
    """A weight [rows, columns] that all experts share in memory. 8-bit floats come with random scales, or with ones."""
    import torch

    if not problem.eighth:
        return weight.expand(problem.experts, -1, -1)
    size = [-(-length // problem.group) for length in weight.shape] if problem.group else (weight.shape[0], 1)
    each = problem.scale in (EXPERT, EXPERT_AND_ROW)
    scales = torch.ones(problem.experts if each else size, device=weight.device)
    if generator is not None:
        scales.uniform_(0.5, 1.5, generator=generator).mul_(weight.shape[1] ** -0.5 / 16)
    scales = scales if each else scales.expand(problem.experts, -1, -1)
    return weight.to(torch.float8_e4m3fn).expand(problem.experts, -1, -1), scales


def operands(problem: Problem, rows: int, generator: torch.Generator):
    """x [rows, hidden], w13 and w2, random, on the generator's device.

    All experts share one set of weights in memory. The module's docstring says which sums are zero. For 8-bit floats,
    w13 and w2 are pairs with their scales.
    """
    import torch

    device, dtype, n = generator.device, problem.dtype, problem.n
    if problem.eighth:

        def drawn(*sizes):
            return torch.randn(sizes, generator=generator, device=device)

        weights = drawn(2 * n, problem.hidden), drawn(problem.hidden, n)
        return drawn(rows, problem.hidden).to(dtype), *(_for_each(problem, w.mul_(16), generator) for w in weights)
    columns = torch.randperm(problem.hidden, generator=generator, device=device)
    inner = torch.randperm(n, generator=generator, device=device)
    x = cancelling(rows, columns, 1, generator, dtype)
    gate = torch.randn((n // 2, problem.hidden), generator=generator, device=device).to(dtype)
    up = cancelling(n // 2, columns, -1, generator, dtype)
    # The gate and up rows come in equal pairs. So the activations, which w2 multiplies, come in equal pairs too.
    odd = gate.new_zeros((n % 2, problem.hidden))
    w13 = torch.cat([torch.cat((half, half, odd))[inner] for half in (gate, up)])
    w2 = cancelling(problem.hidden, inner, -1, generator, dtype).mul_(16)  # large enough that fp16 holds the errors
    w2[1::2].abs_().mul_(0.125)  # sums that are not zero show where the kernel rounds
    return x, w13.expand(problem.experts, -1, -1), w2.expand(problem.experts, -1, -1)


def _certify(problem: Problem, kernel: Kernel, kinds: Kinds, key: Key) -> Certificate:
    import torch

    tested = _tested(kinds)
    most, tally = max(tested), Tally(tested)
    generator = torch.Generator("cuda").manual_seed(problem.n)
    x, w13, w2 = operands(problem, most, generator)
    scores = torch.rand(most, problem.experts, generator=generator, device="cuda")
    weights, ids = torch.topk(scores.softmax(-1), problem.top_k, dim=-1)
    ids = ids.to(torch.int32)
    with kernel.override(problem.fixed):
        want = kernel.run(x.clone(), w13, w2, weights, ids)
    if not bool(torch.isfinite(want).all()):
        raise ArithmeticError("the fixed tile gives values that are not finite")
    for m in tested:
        for at in {0, most - m}:
            part = slice(at, at + m)
            got = kernel.run(x[part].clone(), w13, w2, weights[part].contiguous(), ids[part].contiguous())
            said = f"M={m}: %d of {got.numel()} outputs of {kernel.choose(m)} differ from the fixed tile"
            tally.add_later(got.numel(), bits.count(got, want[part]), said.__mod__)
    return tally.certificate(key, "tiles by M")
