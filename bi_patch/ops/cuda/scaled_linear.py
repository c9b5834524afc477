"""Routes of linears of scaled 8-bit floats on CUDA: for each number of rows the fastest kernel that keeps one order.

Order: that of kernels/triton/scaled_gemm.py. Rows and weights are e4m3. Scales belong to a row, or to a group of 128
elements of K in a row, so no row depends on another. The kernels are cuBLASLt's without split-K, variants of the
bundled one, and a kernel of vLLM that its seam hands over (`hand`): for few rows with groups, and for static
activations. As for 16-bit linears (bi_patch.ops.cuda.linear), a certificate covers one problem for every number of rows
up to a limit. A kernel that differs from the bundled reference at any compared number of rows does not serve. cuBLASLt
rounds once more where it adds a bias, so it serves no linear with a bias.

Static activations have one scale, which the checkpoint has. The weight's scales are multiplied by this scale once
(`keep`), and a sum is multiplied by the products. So kernels that take the two scales in another order have equal bits.

Rounding to 16 bits hides most other orders, and the tensor cores' short sums show them. By rows, half of the compared
sums are exactly zero. By groups, plain random data are compared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from bi_patch.errors import CertificateFailed
from bi_patch.ops import bits, certificates
from bi_patch.ops.certificates import Certificate, Key
from bi_patch.ops.cuda import cublaslt, cublaslt_choice, linear, machine, timing
from bi_patch.ops.cuda.ahead import Ahead
from bi_patch.ops.cuda.cublaslt import Kind
from bi_patch.ops.registration import define
from bi_patch.ops.zero_sums import cancelling

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("vllm.bi_patch")
OPERATION = "cuda.scaled_linear"
DATA = "sums of zero and others, kernels by time"
GROUP = 128
_MEMORY_SHARE = 0.3
# With groups, the library takes only numbers of rows that this divides.
_GROUPED_ROWS = 4


class Problem(NamedTuple):
    """One linear: y [M, n] = (x [M, k] * scales) @ (weight [n, k] * scales).T + bias, from e4m3 to dtype.

    group: 0 for a scale for each row of x and of weight, 128 for one for each group of a row and each block of weight.
    static: one scale for all of x, which the checkpoint has, and group is 0.
    """

    n: int
    k: int
    dtype: torch.dtype
    bias: bool
    group: int
    static: bool = False

    def __str__(self) -> str:
        kind = f"groups of {self.group}" if self.group else "static" if self.static else "by row"
        return f"N={self.n} K={self.k} e4m3 {kind} {machine.name(self.dtype)}{' bias' if self.bias else ''}"


class Kernel(NamedTuple):
    """A kernel of vLLM for groups or for static activations, which serves few rows if certified.

    run: (x [M, K], weight [N, K], x_scale, weight_scale, dtype) -> [M, N] of dtype. With groups, x_scale is
    [M, K / 128] and dtype is bf16. For static activations, x_scale is [M] ones, and weight_scale is [N]. most: the
    maximum M. version: of its library.
    """

    run: Callable[..., torch.Tensor]
    most: int
    version: str


# Kinds that are none of the vendor's: a bundled variant, whose number is `tile`; the handed kernel.
_TILE, _HANDED = -1, -2
_MOST_TIMED = 512  # rows: above, the vendor's kernels are compared with each other only


def _own(what: int, tile: int = 0) -> Kind:
    return Kind(what, tile, 1, 0, 0, 0, 0, 0)


@dataclass
class Route(linear.Route):
    """A linear's route, in which kernels besides the vendor's may serve.

    handed: the kernel of vLLM that was a candidate when the route was made, or None.
    """

    handed: Kernel | None = field(default=None, repr=False)
    _own_kinds: dict[int, Kind | None] = field(default_factory=dict, repr=False)

    def kind(self, rows: int) -> Kind | None:
        """The kind that serves a number of rows if it is none of the vendor's, else None."""
        if rows not in self._own_kinds:
            above = min((m for m in self.preferred if m >= rows), default=None)
            kind = None if above is None else self.preferred[above]
            able = kind is not None and kind.id < 0 and kind in self.kinds
            self._own_kinds[rows] = kind if able and (kind.id == _TILE or self.handed is not None) else None
        return self._own_kinds[rows]


_routes: dict[Problem, Route] = {}
_handed: dict[bool, Kernel | None] = {}  # by whether activations are static; else for groups
_TYPES = ("bfloat16", "float16")
# By the addresses of a layer's two scales, and N: the scales, and their products [N]. None of them is ever freed: no
# other scales get these addresses, and captured graphs have the products' address.
_folded: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
_units: list[torch.Tensor] = []  # ones, which are never freed: captured graphs have their addresses


def hand(kernel: Kernel | None, *, static: bool = False) -> None:
    """Let a kernel of vLLM be a candidate for linears with groups, or with static activations. Call this before
    `certify`."""
    _handed[static] = kernel


def keep(x_scale: torch.Tensor, weight_scale: torch.Tensor, n: int) -> None:
    """Keep the products of a layer's scales of static activations: x_scale, one element, and weight_scale, one element
    or [n], both fp32.

    Call this again once the layer's scales have changed: the kept products change in place.
    """
    key, made = _addresses(x_scale, weight_scale, n), _fold(x_scale, weight_scale, n)
    if key in _folded:
        _folded[key][-1].copy_(made)
    else:
        _folded[key] = x_scale, weight_scale, made


def _addresses(x_scale, weight_scale, n: int) -> tuple[int, int, int]:
    return x_scale.data_ptr(), weight_scale.data_ptr(), n


def _fold(x_scale, weight_scale, n: int):
    return _each(weight_scale, n) * x_scale.reshape(())


def _unit(rows: int, device):
    """[rows] ones, from those that are kept if they suffice."""
    import torch

    held = _kept_units(rows, device)
    return torch.ones(rows, device=device) if held is None else held[:rows]


def _kept_units(rows: int, device):
    return next((ones for ones in _units if ones.device == device and ones.shape[0] >= rows), None)


def _handed_to(problem: Problem) -> Kernel | None:
    return _handed.get(problem.static) if problem.group or problem.static else None


def define_op() -> None:
    """Define torch.ops.bi_patch.scaled_linear. A second call does nothing."""
    define(
        "scaled_linear(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, int group, "
        "ScalarType dtype, bool static) -> Tensor",
        scaled_linear,
        "CUDA",
        lambda x, weight, x_scale, weight_scale, bias, group, dtype, static: x.new_empty(
            (x.shape[0], weight.shape[0]), dtype=dtype
        ),
    )


def scaled_linear(
    x, weight, x_scale, weight_scale, bias, group: int, dtype: torch.dtype, static: bool = False
) -> torch.Tensor:
    """(x [M, K] * scales) @ (weight [N, K] * scales).T + bias [N] -> [M, N] of dtype, from e4m3, by its route.

    group 0: x_scale [M], [M, 1] or one element; weight_scale [N], [N, 1] or one element. group 128: x_scale
    [M, K / 128] of any strides, weight_scale [ceil(N / 128), K / 128]. static, with group 0: x_scale is one element,
    and weight_scale times x_scale is rounded before it multiplies a sum. Scales are fp32. The bundled reference serves
    a problem without a route. Raises CertificateFailed for another dtype or group, and for static groups.
    """
    n, k = weight.shape
    rows = x.shape[0]
    if machine.name(dtype) not in _TYPES or group not in (0, GROUP) or (static and group):
        raise CertificateFailed(f"scaled_linear: no invariant GEMM for groups of {group} and {dtype}")
    if static:
        held = _folded.get(_addresses(x_scale, weight_scale, n))
        weight_scale = _fold(x_scale, weight_scale, n) if held is None else held[-1]
        x_scale = _unit(rows, x.device)
    elif not group:
        x_scale, weight_scale = _each(x_scale, rows), _each(weight_scale, n)
    x = x if linear.packed(x, k) else x.contiguous().clone()
    route = _routes.get((n, k, dtype, bias is not None, group, static))
    kind = route.kind(rows) if route is not None else None
    if kind is not None and kind.id == _HANDED and linear.packed(weight, k):
        return route.handed.run(x, weight, x_scale, weight_scale, dtype)
    if kind is not None and kind.id == _TILE:
        return _variant(kind.tile, x, weight, x_scale, weight_scale, bias, dtype)
    whole = -(-rows // _GROUPED_ROWS) * _GROUPED_ROWS if group else rows
    algorithm = route.algorithm(whole) if route is not None else None
    if algorithm is not None and linear.packed(weight, k) and (bias is None or linear.packed(bias, 1)):
        if whole != rows:
            x, x_scale = _padded(x, x_scale, whole)
        return _vendor(route.gemm, algorithm, x, weight, x_scale, weight_scale, bias)[:rows]
    return bundled(x, weight, x_scale, weight_scale, bias, dtype, route is not None and route.tiles_agree)


def _padded(x, x_scale, rows: int):
    """x and its scales with more rows. No row of a product depends on another: the further rows may hold anything."""
    wide = x.new_empty((rows, x.shape[1]))
    wide[: x.shape[0]].copy_(x)
    scale = x_scale.new_empty((x_scale.shape[1], rows)).t()
    scale[: x.shape[0]].copy_(x_scale)
    return wide, scale


def _each(scale, count: int):
    """One scale for each row, [count], packed."""
    flat = scale.reshape(-1)
    return flat.expand(count).contiguous() if flat.shape[0] != count else flat.contiguous()


def _vendor(gemm: cublaslt.ScaledGemm, algorithm, x, weight, x_scale, weight_scale, bias, out=None):
    """The library's product with the given algorithm, on packed, aligned tensors."""
    if gemm.group:
        x_scale = x_scale.t().contiguous()  # [K / 128, M]; no copy if the scales lie so already
        weight_scale = weight_scale.contiguous()
    if out is None:
        out = x.new_empty((x.shape[0], gemm.n), dtype=gemm.dtype)
    stream = machine.stream(x.get_device())
    given = (t.data_ptr() for t in (x, weight, x_scale, weight_scale))
    gemm(algorithm, *given, None if bias is None else bias.data_ptr(), out.data_ptr(), stream)
    return out


def bundled(x, weight, x_scale, weight_scale, bias, dtype, tiles_agree: bool):
    """The bundled product. tiles_agree: whether any variant may serve; else only the reference does."""
    from bi_patch.kernels.triton import scaled_gemm

    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    shared = machine.shared_memory()
    tile = scaled_gemm.fit(scaled_gemm.REFERENCE, shared)
    if tiles_agree:
        described = _described(x, weight)
        tile = scaled_gemm.choose(x.shape[0], weight.shape[0], shared, described, weight_scale.dim() == 2)
    return scaled_gemm.gemm(x, weight, x_scale, weight_scale, bias, dtype, tile)


def _variant(number: int, x, weight, x_scale, weight_scale, bias, dtype):
    """The bundled product by one variant, or by the reference where its descriptors do not fit the tensors."""
    from bi_patch.kernels.triton import scaled_gemm

    tile = scaled_gemm.TILES[number]
    if tile.persistent and not _described(x, weight):
        tile = scaled_gemm.REFERENCE
    tile = scaled_gemm.fit(tile, machine.shared_memory())
    return scaled_gemm.gemm(x, weight, x_scale, weight_scale, bias, dtype, tile)


def _described(x, weight) -> bool:
    """Whether these tensors may have tensor descriptors."""
    if not machine.vendor_allowed() or weight.shape[0] % 8:
        return False
    return linear.packed(x, x.shape[1]) and weight.data_ptr() % 16 == 0 and weight.stride(0) % 16 == 0


def certify(problems: Iterable[Problem], max_rows: int, cache: Path) -> list[Certificate]:
    """Certify each problem for all M up to max_rows, or read its certificate from `cache`, and set up its route.

    Call this before any graph is captured. Returns one certificate per distinct problem, failed certificates included.
    """
    made, problems = [], list(dict.fromkeys(problems))
    if any(problem.static for problem in problems):
        _keep_units(max_rows)
    for problem in problems:
        key = _key(problem, max_rows)
        certificate = certificates.obtain(
            cache, key, lambda p=problem, k=key: _certify(p, k, max_rows), instead="the bundled GEMM"
        )
        route = linear.route(certificate, _gemm(problem) if _vendors(certificate) else None)
        handed = _handed_to(problem)
        _routes[problem] = Route(
            route.kinds, route.limit, route.tiles_agree, route.gemm, route.preferred, handed=handed
        )
        if _own(_HANDED) in route.kinds and handed is not None:
            _load(problem, handed)
        made.append(certificate)
    return made


def _keep_units(rows: int) -> None:
    import torch

    device = torch.device("cuda", torch.cuda.current_device())
    if _kept_units(rows, device) is None:
        _units.append(torch.ones(rows, device=device))


def _gemm(problem: Problem) -> cublaslt.ScaledGemm:
    return cublaslt.ScaledGemm(problem.n, problem.k, problem.dtype, problem.bias, problem.group)


def _vendors(certificate: Certificate) -> bool:
    return any(kind[0] >= 0 for kind in certificate.algorithms)


def _load(problem: Problem, handed: Kernel) -> None:
    """Call the handed kernel once: it may compile, which must not happen while a graph is captured."""
    import torch

    x, weight = (torch.zeros(m, problem.k, device="cuda").to(torch.float8_e4m3fn) for m in (1, problem.n))
    scales = [torch.ones(size, device="cuda") for size in _scale_sizes(problem, 1)]
    handed.run(x, weight, *scales, problem.dtype)


def _certify(problem: Problem, key: Key, max_rows: int) -> Certificate:
    """The vendor's certificate, with the other kernels that agree, and the fastest of all at each timed M."""
    trial = _Trial(problem, max_rows)
    made = linear.compare(lambda: trial, key)
    own, preferred, times = trial.others(made)
    return msgspec.structs.replace(
        made,
        algorithms=sorted([*made.algorithms, *map(list, own)]),
        preferred=dict(sorted((made.preferred | {m: list(kind) for m, kind in preferred.items()}).items())),
        microseconds=made.microseconds | {"served": {str(m): round(us, 2) for m, us in times.items()}},
    )


def rehearse(problem: Problem, max_rows: int, cache: Path, ahead: Ahead) -> None:
    """Compile ahead what `certify` will launch. Does nothing if `cache` has the certificate."""
    if certificates.load(cache, _key(problem, max_rows)) is None:
        ahead.rehearse(lambda: _rehearse(problem, max_rows))


def _rehearse(problem: Problem, max_rows: int) -> None:
    import torch

    x, weight = (torch.empty((m, problem.k), dtype=torch.float8_e4m3fn, device="meta") for m in (max_rows, problem.n))
    scales = [torch.empty(size, device="meta") for size in _scale_sizes(problem, max_rows)]
    bias = torch.empty(problem.n, dtype=problem.dtype, device="meta") if problem.bias else None
    bundled(x, weight, *scales, bias, problem.dtype, False)
    from bi_patch.kernels.triton import scaled_gemm

    for number, tile in enumerate(scaled_gemm.TILES):
        if not tile.persistent and (tile.k == GROUP or not problem.group):
            _variant(number, x[:1], weight, scales[0][:1], scales[1], bias, problem.dtype)


def _scale_sizes(problem: Problem, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not problem.group:
        return (rows,), (problem.n,)
    groups = -(-problem.k // problem.group)
    return (rows, groups), (-(-problem.n // problem.group), groups)


def routes() -> dict[Problem, linear.Route]:
    """The routes of this process, by problem."""
    return dict(_routes)


def _key(problem: Problem, max_rows: int) -> Key:
    handed = _handed_to(problem)
    libraries = machine.libraries() + (f" {handed.version}" if handed is not None else "")
    return Key(OPERATION, f"{problem} M<={max_rows}", machine.device(), libraries, machine.kernels_digest(), DATA)


class _Trial(linear.Trial):
    """Random data for one problem, the reference's output, and the comparisons with this output."""

    def __init__(self, problem: Problem, max_rows: int):
        import torch

        self.problem = problem
        n, k, dtype, bias, group, static = problem
        self.mixed = bool(group)
        self.handed = _handed_to(problem)
        free, _ = torch.cuda.mem_get_info()
        limit = int(free * _MEMORY_SHARE) - 8 * n * k  # random numbers need more than what is made of them
        self.rows = max(1, min(max_rows, limit // (8 * k + 4 * n)))
        self.copies = (limit - self.rows * (8 * k + 4 * n)) // (n * k)
        generator = torch.Generator("cuda").manual_seed(n * 1_000_003 + k)
        eighth = torch.float8_e4m3fn
        if group:
            self.x, self.weight = (
                torch.randn((m, k), generator=generator, device="cuda").mul_(8).to(eighth) for m in (self.rows, n)
            )
        else:
            order = torch.randperm(k, generator=generator, device="cuda")
            self.x = cancelling(self.rows, order, 1, generator, torch.bfloat16).to(eighth)
            weight = cancelling(n, order, -1, generator, torch.bfloat16)
            weight[1::2].abs_().mul_(0.125)
            self.weight = weight.to(eighth)
        for name, size in zip(("x_scale", "weight_scale"), _scale_sizes(problem, self.rows), strict=True):
            setattr(self, name, torch.rand(size, generator=generator, device="cuda").mul_(0.02).add_(0.001))
        if static:
            self.x_scale.fill_(1.0)
        self.bias, self.bias_given = None, bias
        if bias:
            self.bias = torch.randn(n, generator=generator, device="cuda", dtype=dtype)
            self.bias[::2] = 0  # a bias would hide the rounding left of a sum
        self.gemm = _gemm(problem)
        self.out = torch.empty((self.rows, n), dtype=dtype, device="cuda")
        self.want = self._bundled(self.rows, False)
        if not bool(torch.isfinite(self.want).all()):
            raise ArithmeticError("the bundled GEMM gives values that are not finite")

    def _bundled(self, m: int, tiles_agree: bool):
        given = self.x[:m], self.weight, self.x_scale[:m], self.weight_scale
        return bundled(*given, self.bias, self.problem.dtype, tiles_agree)

    def asked(self) -> list[int]:
        """As linear.Trial.asked. The library adds a bias with another rounding, so with a bias it is not asked."""
        asked = [] if self.bias_given else linear.asked_rows(self.rows)
        return [m for m in asked if m % _GROUPED_ROWS == 0] if self.problem.group else asked

    def take(self, at: int, m: int):
        x, scale = self.x[at : at + m], self.x_scale[at : at + m]
        if self.problem.group:
            scale = scale.t().contiguous().t()
        return x, scale if scale.data_ptr() % cublaslt.ALIGNMENT == 0 else scale.clone()

    def _run(self, algorithm, rows, weight):
        x, scale = rows
        out = self.out[: x.shape[0]]
        return _vendor(self.gemm, algorithm, x, weight, scale, self.weight_scale, self.bias, out)

    def tiles_agree(self) -> bool:
        """Whether every bundled variant that `bundled` may choose gives the reference's bits."""
        tested = [m for m in (1, 16, 17, 32, 33, 64, 65, 512, 513, self.rows) if m <= self.rows]
        return not bits.total(bits.count(self._bundled(m, True), self.want[:m]) for m in tested)

    def others(self, made: Certificate) -> tuple[list[Kind], dict[int, Kind], dict[int, float]]:
        """The kinds besides the vendor's that agree; at each timed M up to _MOST_TIMED the fastest kind, if it is one
        of them; and its microseconds."""
        timed = [m for m in cublaslt_choice.timed_rows(self.rows) if m <= _MOST_TIMED]
        agreeing = {kind: able for kind, able in self._candidates().items() if self._agrees(kind, able)}
        route = linear.route(made, self.gemm)
        weights = self.weights()
        preferred, times = {}, {}
        for m in timed:
            rows = self.take(0, m)
            ways = {kind: partial(self._call, kind, rows) for kind, able in agreeing.items() if able(m)}
            algorithm = (
                route.algorithm(m) if _vendors(made) and (not self.problem.group or m % _GROUPED_ROWS == 0) else None
            )
            if algorithm is not None:
                ways[algorithm.kind] = partial(self._run, algorithm, rows)
            if not ways or not weights:
                continue
            rounds = max(1, 24 // len(weights))
            us = timing.microseconds([[partial(way, w) for w in weights * rounds] for way in ways.values()], 3)
            fastest = min(range(len(us)), key=us.__getitem__)
            preferred[m], times[m] = list(ways)[fastest], us[fastest]
        return list(agreeing), preferred, times

    def weights(self) -> list:
        """The weight and copies, which together exceed the L2 cache; [] if they do not fit into the memory."""
        more = min(2 * machine.cache_bytes() // self.weight.nbytes, 24)
        return [] if more > self.copies else [self.weight, *(self.weight.clone() for _ in range(more))]

    def _candidates(self) -> dict[Kind, Callable[[int], bool]]:
        """Kinds besides the vendor's, each with a function that tells whether it may serve a number of rows."""
        from bi_patch.kernels.triton import scaled_gemm

        grouped = bool(self.problem.group)
        found = {
            _own(_TILE, number): partial(scaled_gemm.able, tile, grouped=grouped)
            for number, tile in enumerate(scaled_gemm.TILES)
            if machine.vendor_allowed() or not tile.persistent
        }
        typed = self.problem.static or machine.name(self.problem.dtype) == "bfloat16"
        if self.handed is not None and not self.bias_given and typed:
            found[_own(_HANDED)] = lambda m: m <= self.handed.most
        return found

    def _agrees(self, kind: Kind, able: Callable[[int], bool]) -> bool:
        """Whether a kernel gives the reference's bits for every compared M that it may serve."""
        every = (
            (*range(1, 66), 127, 128)
            if kind.id == _HANDED
            else (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128)
        )
        tested = [m for m in (*every, 129, 200, 255, 256, 500, 512, 513, self.rows) if m <= self.rows and able(m)]
        try:
            return bool(tested) and not bits.total(
                bits.count(self._call(kind, self.take(at, m), self.weight), self.want[at : at + m])
                for m in tested
                for at in {0, self.rows - m}
            )
        except Exception:
            _log.debug("bi_patch: %s: no candidate %s", self.problem, kind, exc_info=True)
            return False

    def _call(self, kind: Kind, rows, weight):
        x, scale = rows
        if kind.id == _HANDED:
            return self.handed.run(x, weight, scale, self.weight_scale, self.problem.dtype)
        return _variant(kind.tile, x, weight, scale, self.weight_scale, self.bias, self.problem.dtype)
