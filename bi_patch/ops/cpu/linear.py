"""Routes of unquantized linears on CPU: the library's GEMM where it is certified and faster, else the bundled GEMM.

Order: ascending K in fixed blocks, fp32 throughout, the bias added before the only rounding (kernels/cpu/README.md).
The certificate compares the library with the bundled GEMM for each of a fixed set of row counts. The library then
serves only row counts of this set; the bundled GEMM serves all others. The bits are equal, so the faster GEMM serves.

Rounding to 16 bits hides most other orders: on plain random data, one output in thousands shows another order. So the
compared rows nearly cancel against some rows of the weight. The outputs are then mostly rounding errors, which depend
on the order of the sum. (We tried to cut long prefills into certified pieces. Joining the pieces cost more time than
the library saved.)
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bi_patch.ops import bits, certificates
from bi_patch.ops.certificates import Certificate, Evidence, Key
from bi_patch.ops.cpu import certify, machine
from bi_patch.ops.cpu.numbered import Routes
from bi_patch.ops.registration import define

if TYPE_CHECKING:
    import torch

# Every small number of rows, as in decode steps; then the usual token budgets of prefill steps.
ROWS = (*range(1, 17), 32, 64, 128, 256, 512)
TIMED = (1, 8, 64, 512)
OPERATION = "cpu.linear"
DATA = "sums near zero"
_CANCELLED = 256  # how many rows of the weight the compared rows cancel against
_PLACES = 8  # up to 64 rows are compared at this many places of the data
_FASTER = 0.97  # the library serves if its time is below this share of the bundled GEMM's time

Vendor = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor | None"], "torch.Tensor"]


@dataclass
class Linear:
    """One layer's route. New weights keep it: compiled code takes its number, and its packed weight in place.

    key: of the certificate. packed: the weight [n, k], packed for the bundled GEMM. vendor: the library's GEMM, None
    where it serves no row count. vendor_rows: the row counts M that the library serves. layer: the layer, whose
    parameter `vendor` takes. biased: whether the certificate is of products with a bias. function: the route as a
    function (x, weight, bias).
    """

    key: Key
    packed: torch.Tensor
    n: int
    k: int
    vendor: Vendor | None
    vendor_rows: frozenset[int]
    layer: weakref.ref[torch.nn.Module]
    biased: bool
    function: Vendor | None = None

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # A layer may leave its bias out: of tensor-parallel ranks, only the first adds it.
        if x.numel() // self.k in self.vendor_rows and (bias is not None) == self.biased:
            return self.vendor(x, weight, bias)
        return _bundled(x, self.packed, self.n, self.k, bias)


def _bundled(x: torch.Tensor, packed: torch.Tensor, n: int, k: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] @ weight.T + bias by the bundled GEMM. Upstream widens some layers' bias to fp32 for its own kernel;
    converting that bias back is exact."""
    import torch

    own = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
    return torch.ops.bi_cpu.gemm(x, packed, n, k, own)


_layers: Routes[Linear] = Routes("bi_patch_handle", OPERATION, "linear")
_routed: weakref.WeakSet[torch.nn.Module] | None = None


def route(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    vendor: Vendor,
    layer: torch.nn.Module,
    cache: Path,
    library: str,
) -> Vendor:
    """Certify one layer; returns its route as a function (x [..., K], weight, bias) -> x @ weight.T + bias [..., N].

    A layer that has a route keeps its handle, its certified row counts and its function: only the weights change.
    weight: [N, K], as loaded. bias: [N] or None, as loaded. vendor: the library's GEMM, prepared for this weight.
    layer: holds the parameters that `vendor` takes. cache: the folder of certificates and built kernels. library: the
    vendor's version. Raises CertificateFailed if the bundled kernels cannot be built.
    """
    import torch

    machine.load_kernels(cache)
    n, k = weight.shape
    packed = torch.ops.bi_cpu.gemm_pack(weight)
    _note(layer)
    asked = key(n, k, weight.dtype, bias is not None, library)
    held = _layers.of(layer)
    if held is not None and held.key == asked:
        held.packed.copy_(packed)
        held.vendor = vendor if held.vendor_rows else None
        return held.function
    certificate = certify.certify_linear(cache, asked, lambda: _certify(asked, weight, packed, bias, vendor, layer))
    rows = serving(certificate)
    made = Linear(asked, packed, n, k, vendor if rows else None, rows, weakref.ref(layer), bias is not None)
    made.function = _function(made, _layers.add(layer, made))
    return made.function


def _function(linear: Linear, handle: int) -> Vendor:
    """A route as a function. Whether the library serves decides which of its two operators compiled code calls."""
    import torch

    _define_op()
    packed, n, k, library = linear.packed, linear.n, linear.k, bool(linear.vendor_rows)
    # A tensor, as the packed weight is: compiled code takes both from the layers of the model that it runs with. An
    # integer would be a part of the code, and the code also serves another engine with the same configuration. There,
    # certificates may choose the other operator, so every route holds what both take.
    number = torch.tensor(handle, device="cpu")

    def apply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not library:
            return _bundled(x, packed, n, k, bias)
        if torch.compiler.is_compiling():
            return torch.ops.bi_patch.cpu_linear(x, bias, number, n)
        return linear(x, weight, bias)

    return apply


def routes(model: torch.nn.Module) -> list[Linear]:
    """The routes of a model's layers."""
    return _layers.within(model)


def has_route(layer: torch.nn.Module) -> bool:
    """Whether `route` gave this layer a route."""
    return _layers.of(layer) is not None


def unpacked(layer: torch.nn.Module) -> torch.Tensor:
    """The weight [n, k] that a layer with a route computes with: its product with the identity is exact."""
    import torch

    held = _layers.of(layer)
    eye = torch.eye(held.k, dtype=held.packed.dtype)
    return torch.ops.bi_cpu.gemm(eye, held.packed, held.n, held.k, None).T


def take_routed() -> set[torch.nn.Module]:
    """The layers that were routed since the last call."""
    global _routed
    taken, _routed = set(_routed or ()), None
    return taken


def _note(layer: torch.nn.Module) -> None:
    global _routed
    if _routed is None:
        _routed = weakref.WeakSet()
    _routed.add(layer)


def key(n: int, k: int, dtype: torch.dtype, bias: bool, library: str) -> Key:
    """The key of a linear's certificate. n, k: the weight's shape [n, k]. library: the vendor's version."""
    problem = f"N={n} K={k} {str(dtype).removeprefix('torch.')}{' bias' if bias else ''}"
    return Key(OPERATION, problem, machine.device(), machine.libraries(library), machine.kernels_digest(), DATA)


def revealing(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Random x [rows, K] whose products with some rows of weight [N, K] are near zero, in weight's dtype.

    x is made orthogonal to those rows in fp64, then rounded to weight's dtype. Each of these sums then holds only the
    rounding of x, in bf16 about a thousandth of the size of the terms. So the rounding of the sum itself, which depends
    on its order, shows in the output.
    """
    import torch

    n, k = weight.shape
    generator = torch.Generator().manual_seed(n * 1_000_003 + k)
    x = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    picked = torch.randperm(n, generator=generator)[: min(_CANCELLED, n, k // 4)]
    span = torch.linalg.qr(weight[picked].to(torch.float64).T).Q
    return (x - x @ span @ span.T).to(weight.dtype)


def _certify(asked: Key, weight, packed, bias, vendor, layer) -> Certificate:
    """Compare the library with the bundled GEMM, bitwise, for every M that it may be given."""
    import torch

    start = time.perf_counter()
    n, k = weight.shape
    x = revealing(weight, ROWS[-1])
    held = None if bias is None else layer.bias
    # The layer's bias would hide sums near zero, so a bias of zeros is compared too.
    biases = [(bias, held)] if bias is None else [(bias, held), (torch.zeros_like(bias), torch.zeros_like(held))]
    wants = [(torch.ops.bi_cpu.gemm(x, packed, n, k, own), given) for own, given in biases]
    if not all(bool(torch.isfinite(want.float()).all()) for want, _ in wants):
        raise ArithmeticError("the weights give values that are not finite")
    compared, differing, first, passed = 0, 0, "", []
    for m in ROWS:
        unequal = tried = 0
        for at, (want, given) in itertools.product(_places(m), wants):
            got, expected = vendor(x[at : at + m], layer.weight, given), want[at : at + m]
            unequal += bits.differing(got, expected)
            tried += got.numel()
        compared, differing = compared + tried, differing + unequal
        if unequal:
            first = first or f"M={m}: {unequal} of {tried} elements"
        else:
            passed.append(m)
    timed = {
        "library": {str(m): _time(lambda m=m: vendor(x[:m], layer.weight, held)) for m in TIMED if m in passed},
        "bundled": {str(m): _time(lambda m=m: torch.ops.bi_cpu.gemm(x[:m], packed, n, k, bias)) for m in TIMED},
    }
    return Certificate(
        asked,
        "library" if passed else "bundled",
        differing == 0,
        passed,
        Evidence(list(ROWS), compared, differing, first),
        round(time.perf_counter() - start, 3),
        certificates.today(),
        timed,
    )


def _places(m: int) -> list[int]:
    """The first row of each group of m rows that is compared."""
    last = ROWS[-1] - m
    return sorted({last * i // (_PLACES - 1) for i in range(_PLACES)}) if m <= 64 else [last // 2]


def serving(certificate: Certificate) -> frozenset[int]:
    """The M that the library serves: certified, and faster there. The nearest timed M decides."""
    if not certificate.passed_rows:
        return frozenset()
    library, bundled = (certificate.microseconds.get(kernel, {}) for kernel in ("library", "bundled"))
    faster = {int(m): library[m] < bundled[m] * _FASTER for m in library}
    chosen = set()
    for m in certificate.passed_rows:
        nearest = min(faster, key=lambda t: abs(t - m), default=None)
        if nearest is not None and faster[nearest]:
            chosen.add(m)
    return frozenset(chosen)


def _time(call: Callable[[], object], seconds: float = 0.01) -> float:
    """The least time of a call in microseconds, over calls for about `seconds`."""
    call()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return round(best * 1e6, 1)


def _define_op() -> None:
    """Define torch.ops.bi_patch.cpu_linear, which runs a layer's route in compiled code.

    number: int64, without dimensions: the layer's handle. Raises CertificateFailed if no living layer has this handle,
    or if its weight has other sizes.
    """
    define(
        "cpu_linear(Tensor x, Tensor? bias, Tensor number, int n) -> Tensor",
        _run,
        "CPU",
        lambda x, bias, number, n: x.new_empty((*x.shape[:-1], n)),
    )


def _run(x: torch.Tensor, bias: torch.Tensor | None, number: torch.Tensor, n: int) -> torch.Tensor:
    held, layer = _layers.called(number, n, x.shape[-1])
    return held(x, layer.weight, bias)
