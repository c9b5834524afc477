"""Products of experts with packed weights of 4 bits on CUDA, on a bundled kernel. All forms of it have one order.

Weights are integers, or floats e2m1 with powers of two as scales (MXFP4), or with scales in e4m3 and one fp32 number
for each expert (NVFP4), by which the fp32 sum is multiplied. Order: that of 16-bit linears (bi_patch.ops.cuda.linear)
for the dequantized weights of each expert. The sum, with the expert's bias, is multiplied by the router's weight in
fp32, and rounded once (kernels/cuda/packed.py).

A certificate compares each form with the bundled GEMM of the dequantized weights, expert by expert. A form that differs
does not serve. No other kernel takes packed weights, so no engine starts if no form is left.

As for linears, half of the compared sums are exactly zero. The router's weights are 1 and -1: such a product rounds
nothing, so it can be made after the reference is rounded. NVFP4's numbers of experts are powers of two, so the
reference's weights can have them.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bi_patch.errors import CertificateFailed
from bi_patch.ops import bits, certificates
from bi_patch.ops.certificates import Certificate, Evidence, Key
from bi_patch.ops.cuda import linear, machine, packed_linear
from bi_patch.ops.cuda.ahead import Ahead
from bi_patch.ops.zero_sums import cancelling

if TYPE_CHECKING:
    import torch

    from bi_patch.kernels.cuda.packed import Form, Rows
    from bi_patch.kernels.packing import Packed

_log = logging.getLogger("vllm.bi_patch")
OPERATION = "cuda.packed_products"
DATA = "sums of zero and others, several experts"
_EXPERTS, _TOP = 5, 3  # of the compared products
_WHOLES = (0.25, 2.0, 0.5, 1.0, 0.125)  # of NVFP4's experts in a comparison: powers of two
_COMPARED = (1, 2, 3, 8, 9, 17, 40, 130, 300)  # tokens


class Problem(NamedTuple):
    """One product of each expert: y [M, n] = x [M, k] @ w [n, k].T + bias [n], w from integers of 4 bits.

    dtype: of x, y, bias and the scales. group: elements of K that share a scale. zeros: whether there are zero points.
    floats: weights are floats e2m1 in place of integers, in groups of 32 with powers of two as scales, or in groups of
    16 with scales in e4m3 and one number for each expert. K of the packed weights may be greater than k, up to the next
    multiple of 128.
    """

    n: int
    k: int
    dtype: torch.dtype
    bias: bool
    group: int
    zeros: bool
    floats: bool = False

    def __str__(self) -> str:
        return f"experts {self.of_one()}"

    def of_one(self) -> packed_linear.Problem:
        """The product of one expert."""
        return packed_linear.Problem(self.n, self.k, self.dtype, self.bias, 4, self.group, self.zeros, self.floats)

    @property
    def tail(self) -> bool:
        """Whether k is not whole blocks of the packed weights."""
        from bi_patch.kernels.packing import BLOCK_K

        return self.k % BLOCK_K > 0

    @property
    def whole(self) -> bool:
        """Whether each expert has one fp32 number for all of its weights."""
        from bi_patch.kernels.packing import has_whole

        return self.floats and has_whole(self.group, True)


_able: dict[Problem, tuple[int, ...]] = {}  # numbers of the forms whose certificate passed


def served() -> bool:
    """Whether every form for experts runs on this device. Some GPUs run too few to be fast."""
    import torch

    from bi_patch.kernels.cuda import packed

    capability = torch.cuda.get_device_capability()
    return all(form.runs_on(capability) for form in packed.FORMS_OF_EXPERTS)


def form(problem: Problem, ids: int, experts: int) -> Form:
    """The form that serves `ids` rows of x, spread over `experts` experts. Raises CertificateFailed if no form may."""
    able = _able.get(problem, ())
    if not able:
        raise CertificateFailed(f"{OPERATION}: {problem} has no certificate")
    return _form(able, ids, experts, problem.n, problem.k)


@functools.cache
def _form(able: tuple[int, ...], ids: int, experts: int, n: int, k: int) -> Form:
    from bi_patch.kernels.cuda import packed

    best = packed.form_of_experts(ids, experts, n, k)
    held = [packed.FORMS_OF_EXPERTS[number] for number in able]
    return best if best in held else min(held, key=lambda form: abs(form.tiles - best.tiles))


def product(x: torch.Tensor, packed: Packed, rows: Rows, bias: torch.Tensor | None, form: Form, out: torch.Tensor):
    """kernels.cuda.packed.product_of_experts, for x that may have gaps. Raises CertificateFailed if the types of x and
    the scales differ, or if x is not bf16 and weights are floats e2m1."""
    from bi_patch.kernels.cuda.packed import product_of_experts

    if machine.name(x.dtype) != "bfloat16" if packed.floats else packed.scale.dtype != x.dtype:
        raise CertificateFailed(f"{OPERATION}: no invariant product for {x.dtype} and scales of {packed.scale.dtype}")
    x = x if linear.packed(x, x.shape[1]) else x.clone()
    product_of_experts(x, packed, rows, bias, form, out)


def certify(problems: Iterable[Problem], max_rows: int, cache: Path) -> list[Certificate]:
    """Certify each problem for every number of rows, or read its certificate from `cache`.

    Call this before any graph is captured. max_rows: without effect; the forms of many rows serve any number of tiles.
    Returns one certificate per distinct problem. Raises CertificateFailed if no form is left for a problem.
    """
    from bi_patch.kernels.cuda import nvrtc

    nvrtc.folder = cache / "cubins"
    made = []
    for problem in dict.fromkeys(problems):
        key = _key(problem)
        certificate = certificates.obtain(
            cache, key, lambda p=problem, k=key: _certify(p, k), instead="what is left of its forms"
        )
        _able[problem] = tuple(number for (number,) in certificate.algorithms)
        if not _able[problem]:
            certificates.require([certificate])
        made.append(certificate)
    return made


def rehearse(problem: Problem, max_rows: int, cache: Path, ahead: Ahead) -> None:
    """Compile ahead what `certify` will launch. Does nothing if `cache` has the certificate."""
    if certificates.load(cache, _key(problem)) is not None:
        return
    import torch

    from bi_patch.kernels.cuda import nvrtc, packed

    nvrtc.folder = cache / "cubins"
    device = torch.cuda.current_device()
    for number in runnable(problem):
        held = packed.FORMS_OF_EXPERTS[number]
        given = problem.group, problem.zeros, problem.dtype, device, True, problem.floats, problem.tail
        ahead.work(lambda f=held, g=given: packed.prepare(f, *g))
    ahead.rehearse(lambda: packed_linear.rehearse_reference(problem.of_one(), 512))


def runnable(problem: Problem) -> list[int]:
    """The numbers of the forms that this device can run."""
    import torch

    from bi_patch.kernels.cuda import packed

    capability, shared = torch.cuda.get_device_capability(), machine.shared_memory()
    fits = (
        form.runs_on(capability) and packed.fits(form, problem.group, problem.zeros, shared, True, problem.floats)
        for form in packed.FORMS_OF_EXPERTS
    )
    return [number for number, able in enumerate(fits) if able]


def sort(ids: torch.Tensor, block: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As vLLM's moe_align_block_size, for ids [M, top_k] on any device: sorted_ids and experts of Rows, and padded.

    The entries after the padded ones are no ids and no experts, so that a kernel that reads them fails.
    """
    import torch

    flat = ids.flatten().long()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)
    tiles = (counts + block - 1) // block
    first = (tiles.cumsum(0) - tiles) * block  # of each expert, its first place
    inside = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[flat[order]]
    used, beyond = int(tiles.sum()), 2
    sorted_ids = torch.full(((used + beyond) * block,), 2**30, dtype=torch.int32, device=flat.device)
    sorted_ids[: used * block] = len(flat)
    sorted_ids[first[flat[order]] + inside] = order.int()
    of_tiles = torch.full((used + beyond,), 2**30, dtype=torch.int32, device=flat.device)
    of_tiles[:used] = torch.repeat_interleave(torch.arange(experts, device=flat.device), tiles).int()
    return sorted_ids, of_tiles, torch.tensor([used * block], dtype=torch.int32, device=flat.device)


def _key(problem: Problem) -> Key:
    return Key(OPERATION, str(problem), machine.device(), machine.libraries(), machine.kernels_digests(), DATA)


def _certify(problem: Problem, key: Key) -> Certificate:
    import torch

    from bi_patch.kernels.cuda import packed

    start = time.perf_counter()
    trial = _Trial(problem)
    counts = {(number, m): trial.differing(number, m) for number in runnable(problem) for m in _COMPARED}
    found = dict(zip(counts, torch.stack(list(counts.values())).tolist(), strict=True)) if counts else {}
    good = sorted({number for number, _ in found} - {number for (number, _), wrong in found.items() if wrong})
    first = next(((number, m, wrong) for (number, m), wrong in found.items() if wrong), None)
    said = ""
    if first:
        number, m, wrong = first
        said = f"{m} tokens: {wrong} outputs of {packed.FORMS_OF_EXPERTS[number]} differ from the bundled GEMM"
    elif not found:
        said = "this device runs no form"
    bad = {m for (_, m), wrong in found.items() if wrong}
    del trial
    torch.cuda.empty_cache()
    return Certificate(
        key=key,
        route="bundled" if good else "kept",
        passed=bool(good) and not bad,
        passed_rows=[m for m in _COMPARED if m not in bad] if found else [],
        evidence=Evidence(
            rows=list(_COMPARED) if found else [],
            compared=sum(2 * m * _TOP * problem.n for _, m in found),
            differing=sum(found.values()),
            first=said,
        ),
        seconds=round(time.perf_counter() - start, 3),
        made=certificates.today(),
        algorithms=[[number] for number in good],
    )


def _drawn(problem: Problem, order: torch.Tensor, generator: torch.Generator):
    """As packed_linear.drawn, of one expert. Floats in groups of 32 get exponents of three neighbouring values, and K
    is filled up."""
    import torch

    from bi_patch.kernels.packing import pack_float_experts

    if not problem.floats or problem.whole:
        return packed_linear.drawn(problem.of_one(), order, generator)
    n, k, device = problem.n, problem.k, generator.device
    half = torch.randint(-7, 8, (n, k // 2), generator=generator, device=device, dtype=torch.int16)
    value = torch.cat((half, -half), 1)[:, order]  # pairs that cancel where the scale is one for a row
    value[1::2].abs_()
    codes = (value.abs() | (value < 0).to(torch.int16) * 8).to(torch.uint8)
    exponent = torch.randint(117, 120, (n, k // problem.group), generator=generator, device=device)
    exponent[::2] = exponent[::2, :1]
    packed = pack_float_experts(codes[None], exponent[None].to(torch.uint8))
    return packed._replace(scale=packed.scale[0]), packed_linear.drawn_bias(problem.of_one(), generator)


class _Trial:
    """Random data for one problem, what the bundled GEMM gives for each row and expert, and comparisons with it."""

    def __init__(self, problem: Problem):
        import torch

        from bi_patch.kernels.packing import Packed

        n, k, dtype, *_ = self.problem = problem
        self.generator = torch.Generator("cuda").manual_seed(n * 1_000_003 + k)
        order = torch.randperm(k, generator=self.generator, device="cuda")
        self.x = cancelling(max(_COMPARED) * _TOP, order, 1, self.generator, dtype)
        made = [_drawn(problem, order, self.generator) for _ in range(_EXPERTS)]
        each = [one for one, _ in made]
        zero = torch.stack([one.zero for one in each]) if problem.zeros else None
        scale = torch.stack([one.scale for one in each])
        weights = [packed_linear.dequantize(one)[:, :k].contiguous() for one in each]
        whole = torch.tensor(_WHOLES, device="cuda") if problem.whole else None
        if whole is not None:
            weights = [weight * by for weight, by in zip(weights, _WHOLES, strict=True)]
        self.packed = Packed(torch.cat([one.data for one in each]), scale, zero, 4, problem.group, whole)
        self.bias = torch.stack([bias for _, bias in made]) if problem.bias else None
        self.want = torch.stack(
            [linear.bundled(self.x, w, bias, False) for w, (_, bias) in zip(weights, made, strict=True)]
        )
        if not bool(torch.isfinite(self.want).all()):
            raise ArithmeticError("the bundled GEMM gives values that are not finite")

    def differing(self, number: int, m: int) -> torch.Tensor:
        """How many outputs of a form differ for m tokens, int64 []: of a first product, and of a second product, which
        multiplies by the router's weights. All, if the form does not run."""
        import torch

        scores = torch.rand((m, _EXPERTS), generator=self.generator, device="cuda")
        ids = scores.topk(_TOP, dim=-1).indices
        rows = torch.arange(m * _TOP, device="cuda")
        signs = torch.randint(0, 2, (m * _TOP,), generator=self.generator, device="cuda").float() * 2 - 1
        flat = ids.flatten()
        first, second = self.want[flat, rows // _TOP], self.want[flat, rows] * signs[:, None].to(self.want.dtype)
        try:
            got = self._run(number, self.x[:m], ids, _TOP, None)
            weighted = self._run(number, self.x[: m * _TOP], ids, 1, signs)
            return bits.count(got, first) + bits.count(weighted, second)
        except Exception:
            _log.debug("bi_patch: %s: no form %s", self.problem, number, exc_info=True)
            return torch.tensor(2 * first.numel(), device="cuda")

    def _run(self, number: int, x, ids, each: int, weights):
        import torch

        from bi_patch.kernels.cuda import packed

        held = packed.FORMS_OF_EXPERTS[number]
        out = torch.full((ids.numel(), self.problem.n), float("nan"), dtype=x.dtype, device="cuda")
        rows = packed.Rows(*sort(ids, 8 * held.tiles, _EXPERTS), each, ids.numel(), weights)
        product(x, self.packed, rows, self.bias, held, out)
        return out
