"""Tiles of the Triton experts on CUDA: by the number of tokens, never splitting K, certified against one fixed tile.

Order: each expert's two products run over ascending K in one pass with one fp32 accumulator; a token's experts are then
summed in the order of its top-k list. Tiles change neither where the device's matrix instructions add alike.

As for linears, rounding to 16 bits hides most other orders. So sums are compared that are zero: those of the first
product's `up` half, whose rounding errors are then what half of the sums of the second product cancel.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bi_patch.ops import bits, certificates
from bi_patch.ops.certificates import Certificate, Key, Tally
from bi_patch.ops.cuda import machine
from bi_patch.ops.zero_sums import cancelling

if TYPE_CHECKING:
    import torch

OPERATION = "cuda.moe"
DATA = "sums of zero and others"
# What every other tile is compared with, and what serves where one differs: upstream's tile in its own mode.
FIXED = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 8, "SPLIT_K": 1}
_fixed: set[tuple[int, int, str | None]] = set()
_done: set[Problem] = set()
_TABLES = Path(__file__).resolve().parent / "tables"


class Problem(NamedTuple):
    """w13 [experts, 2 * n, hidden] and w2 [experts, hidden, n], top_k experts a token."""

    experts: int
    n: int
    hidden: int
    top_k: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"E={self.experts} N={self.n} K={self.hidden} top{self.top_k} {machine.name(self.dtype)}"

    @property
    def table(self) -> tuple[int, int, str | None]:
        """The key by which vLLM looks for tiles: experts, n, name of the quantization (None: bf16 or fp16)."""
        return self.experts, self.n, "float32" if self.dtype.itemsize == 4 else None


class Kernel(NamedTuple):
    """run: (x [M, hidden], w13, w2, weights [M, top_k] fp32, ids [M, top_k] int32) -> [M, hidden]. choose: M -> tile.

    override: a context in which every call takes the given tile.
    """

    run: Callable[..., torch.Tensor]
    choose: Callable[[int], dict[str, int]]
    override: Callable[[dict[str, int]], Any]


def one_pass(tile: dict[str, int]) -> dict[str, int]:
    """`tile` without a split of K."""
    return {**tile, "SPLIT_K": 1}


def is_fixed(experts: int, n: int, dtype: str | None) -> bool:
    """Whether a size's tiles failed, so that only FIXED may serve it."""
    return (experts, n, dtype) in _fixed


def bundled_table(experts: int, n: int, dtype: str | None) -> dict[int, dict[str, int]] | None:
    """Our own tuned tiles by number of tokens, for this device, or None."""
    model = machine.device().split(" sm_")[0].replace(" ", "_")
    file = _TABLES / f"moe-{model}-E{experts}-N{n}{'-' + dtype if dtype else ''}.json"
    if not file.is_file():
        return None
    return {int(m): tile for m, tile in json.loads(file.read_text()).items()}


def certify(problem: Problem, kernel: Kernel, max_rows: int, library: str, cache: Path) -> Certificate | None:
    """Compare every tile that any M up to max_rows gets with FIXED; where the certificate fails, FIXED serves the size.

    library: names the version of the kernel's. Returns None for a problem that this process has seen before.
    """
    if problem in _done:
        return None
    _done.add(problem)
    kinds: dict[str, list[int]] = {}
    for m in range(1, max_rows + 1):
        kinds.setdefault(json.dumps(kernel.choose(m), sort_keys=True), []).append(m)
    tiles = json.dumps({min(rows): kind for kind, rows in kinds.items()}, sort_keys=True)
    asked = f"{problem} M<={max_rows} {tiles}"
    key = Key(OPERATION, asked, machine.device(), f"{library} {machine.libraries()}", machine.kernels_digest(), DATA)
    certificate = certificates.obtain(
        cache, key, lambda: _certify(problem, kernel, kinds, key), instead="the fixed tile"
    )
    if not certificate.passed:
        _fixed.add(problem.table)
    return certificate


def operands(problem: Problem, rows: int, generator: torch.Generator):
    """x [rows, hidden], w13 and w2 on the generator's device; every expert has the same weights, held once."""
    import torch

    device, dtype, n = generator.device, problem.dtype, problem.n
    columns = torch.randperm(problem.hidden, generator=generator, device=device)
    inner = torch.randperm(n, generator=generator, device=device)
    x = cancelling(rows, columns, 1, generator, dtype)
    gate = torch.randn((n // 2, problem.hidden), generator=generator, device=device).to(dtype)
    up = cancelling(n // 2, columns, -1, generator, dtype)
    # Gate and up rows come in equal pairs, so the activations that w2 multiplies do.
    odd = gate.new_zeros((n % 2, problem.hidden))
    w13 = torch.cat([torch.cat((half, half, odd))[inner] for half in (gate, up)])
    w2 = cancelling(problem.hidden, inner, -1, generator, dtype).mul_(16)  # fp16 holds what their sums leave
    w2[1::2].abs_().mul_(0.125)  # sums that are not zero show where they are rounded
    return x, w13.expand(problem.experts, -1, -1), w2.expand(problem.experts, -1, -1)


def _certify(problem: Problem, kernel: Kernel, kinds: dict[str, list[int]], key: Key) -> Certificate:
    import torch

    tested = sorted({m for rows in kinds.values() for m in (rows[0], min(rows[-1], 4096)) if m in rows or m == 4096})
    most, tally = max(tested), Tally(tested)
    generator = torch.Generator("cuda").manual_seed(problem.n)
    x, w13, w2 = operands(problem, most, generator)
    scores = torch.rand(most, problem.experts, generator=generator, device="cuda")
    weights, ids = torch.topk(scores.softmax(-1), problem.top_k, dim=-1)
    ids = ids.to(torch.int32)
    with kernel.override(FIXED):
        want = kernel.run(x.clone(), w13, w2, weights, ids)
    if not bool(torch.isfinite(want).all()):
        raise ArithmeticError("the fixed tile gives values that are not finite")
    for m in tested:
        for at in {0, most - m}:
            part = slice(at, at + m)
            got = kernel.run(x[part].clone(), w13, w2, weights[part].contiguous(), ids[part].contiguous())
            wrong = bits.differing(got, want[part])
            said = f"M={m}: {wrong} of {got.numel()} outputs of {kernel.choose(m)} differ from the fixed tile"
            tally.add(got.numel(), wrong, said)
    return tally.certificate(key, "tiles by M")
