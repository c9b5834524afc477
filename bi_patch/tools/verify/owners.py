"""Finds the seam of an op: by the Python frames above the op, otherwise by the module in which the op runs."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator

from bi_patch import installed
from bi_patch.arming import catalog, process
from bi_patch.errors import BiPatchError
from bi_patch.tools import findings

# Seams that wrap code of other seams: the whole engine or step, a model's whole attention layer, the product of a head,
# the whole sampler.
_AROUND = (
    "engine.",
    "rotary.cuda_qk_norm",
    "sampling.cuda_logits",
    "sampling.specific_logprobs",
    "speculation.rows",
    "weights.",
)
# Ops whose name identifies the seam.
_BY_OP = (
    ("all_reduce", ("communicator.cuda_sum", "communicator.one_stage")),
    ("reduce_scatter", ("communicator.cuda_scatter", "communicator.fusion")),
    ("KV cache", ("attention.cpu_store",)),
    ("request's seed", ("seeds.request",)),
    ("grammar mask", ("structured.compile",)),
    ("accepted tokens", ("speculation.rows",)),
    ("encoded images", ("vision.cpu_alone", "vision.cuda_alone")),
)


class Owners:
    """Maps code objects, modules of ops/ and classes of layers to this process's seams.

    A closed seam is known by the code of its replacement, an open seam by the code of its target.
    """

    def __init__(self) -> None:
        current = process.state()
        self._codes: dict[types.CodeType, str] = {}
        self._planned: set[str] = set()
        self._by_op: dict[str, str] = {}  # module of ops/ -> the seam that calls it
        self._by_class: dict[str, str] = {}  # class of vLLM's layers -> the seam that serves the class
        plan = current.plan if current is not None else _plan()
        if plan is None:
            return
        self._planned = {p.seam.name for p in plan.seams} | {s.name for s in plan.variables + plan.policies}
        for planned in plan.seams:
            if planned.seam.op:
                self._by_op.setdefault(planned.seam.op, planned.seam.name)
            for kind in planned.seam.serves:
                self._by_class.setdefault(kind, planned.seam.name)
            module = sys.modules.get(planned.target.module)
            entries = current.ledger.of(planned.seam.name) if current is not None else []
            for entry in entries:
                self._learn(entry.replacement, planned.seam.name)
            if module is not None and not entries:  # an open seam: the original runs
                self._learn(_resolve(module, planned.target.qualname), planned.seam.name)

    def _learn(self, held, seam: str) -> None:
        code = getattr(inspect.unwrap(getattr(held, "__func__", held), stop=_ours), "__code__", None)
        if code is not None:
            self._codes.setdefault(code, seam)

    def seam(self, module, path: str, op: str) -> str:
        """The name of the op's seam, or "" where the op has none."""
        for part, names in _BY_OP:
            if part in op:
                found = next((n for n in names if n in self._planned), "")
                return found or names[0].split(".")[0]
        for frame in _frames():
            found = self._codes.get(frame.f_code)
            if found and not found.startswith(_AROUND):
                return found
            found = self._by_op.get(frame.f_globals.get("__name__", ""))
            if found:
                return _of_scheme(module) or _of_packed_experts(module) or found
        if quantized := _of_scheme(module):
            return quantized
        if packed := _of_packed_experts(module):
            return packed
        kinds = (kind.__name__ for kind in type(module).__mro__)
        return next((self._by_class[kind] for kind in kinds if kind in self._by_class), "")


def _of_scheme(module) -> str:
    """The seam of a quantized linear on CPU, "" for other layers: all schemes share one module of ops/."""
    from bi_patch.ops.cpu import quantized

    if not quantized.has_route(module):
        return ""
    kinds = {"W8": "int8", "W4": "int4", "FP": "fp8"}
    return f"quantized.cpu_{kinds[quantized.scheme(module)[:2]]}"


def _of_packed_experts(module) -> str:
    """The seam of experts of 4 bits on bi_patch's kernel, "" for other layers. All experts share their classes."""
    from bi_patch.seams.cuda import packed_experts

    held = packed_experts.kernel(getattr(module, "routed_experts", module))
    return packed_experts.OWNED.get(type(held).__name__, "")


def status(seam: str) -> str:
    """A seam's status: closed, open or not needed here, with the reason; "" for a seam that this process lacks."""
    if process.state() is None:
        return "open (bi_patch is not armed)"
    for finding in findings.everything(load=False):
        if finding.name == seam:
            return finding.status + (f" ({finding.reason})" if finding.reason else "")
    return ""


def kernel(func, args: tuple) -> str:
    """The kernel behind an op: the route of bi_patch's linear on CUDA; for every other op, its name with overload."""
    name = str(func)
    if name.startswith("bi_patch.linear"):
        from bi_patch.ops.cuda import linear

        x, weight, bias = args
        n, k = weight.shape
        route = linear.routes().get(linear.Problem(n, k, x.dtype, bias is not None))
        served = route is not None and route.algorithm(x.numel() // k) is not None
        return f"{name} by {'cuBLASLt' if served else 'the bundled Triton GEMM'}"
    return name


def _plan():
    """The plan that arming would follow here, or None. In a stock engine, ops are named by the seams of this plan."""
    found = installed.find(None)
    try:
        return catalog.plan(found.release, found.platform) if found is not None else None
    except BiPatchError:
        return None


def _ours(function) -> bool:
    return getattr(function, "__module__", "").startswith("bi_patch") or not hasattr(function, "__wrapped__")


def _resolve(module, qualname: str):
    held = module
    for part in qualname.split("."):
        held = inspect.getattr_static(held, part, None)
    return held


def _frames() -> Iterator[types.FrameType]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
