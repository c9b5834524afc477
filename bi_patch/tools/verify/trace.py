"""Traces one request, the target, through the engine: a digest of its rows after every op and every module.

Rows are identified by their token's absolute position in the target, so that traces of chunked prefill, decode and
batches of any size line up. The traced engine runs eagerly, unless the trace is coarse. Only this process is traced;
ranks above 0 are not.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

WIDTH = 8  # bytes of a row's digest
FORWARD, LOGITS, LOGPROBS, SAMPLE, RETURNED, POOLED = (
    "forward",
    "logits",
    "logprobs",
    "sample",
    "returned",
    "pooled",
)
CACHE = "KV cache"  # the op of a call that records what a layer is about to read from its cache
ACCEPTED = "accepted tokens"  # the op of a call that records what a step with drafts keeps
SEED = "request's seed"  # the op of a call that records the seed with which the runner samples
MODULE = "(module)"  # the op of a call that records a module's own output
# Ops that are not recorded: they return unwritten memory, or random numbers that need not be the target's own.
_UNDEFINED = ("empty", "new_empty", "rand", "exponential", "uniform", "normal", "bernoulli")


class Call(msgspec.Struct, frozen=True, array_like=True):
    """The target's rows of one output of one op or module.

    step: engine step. position: absolute position of the first row's token. digests: WIDTH bytes for each row.
    shape, stride: of the whole output, so shape[0] is M. seam: the op's seam, "" for none. kernel: the kernel that ran.
    """

    step: int
    phase: str
    module: str
    kind: str
    op: str
    output: int
    position: int
    digests: bytes
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    seam: str
    kernel: str

    @property
    def rows(self) -> int:
        return len(self.digests) // WIDTH

    def digest(self, position: int) -> bytes:
        at = (position - self.position) * WIDTH
        return self.digests[at : at + WIDTH]


class Trace(msgspec.Struct, frozen=True):
    """The target's calls in execution order. coarse: only the results of compiled code, not the ops inside."""

    calls: list[Call]
    coarse: bool = False


@dataclass(frozen=True)
class Rows:
    """Where the target's rows are in the tensors of one phase of one step.

    sizes: a tensor whose leading dimension is one of these holds rows of this phase. start, count: the target's rows.
    position: the position of the first.
    """

    step: int
    phase: str
    sizes: frozenset[int]
    start: int
    count: int
    position: int

    def of(self, tensor: torch.Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] in self.sizes and tensor.device.type != "meta"


Owner = Callable[[object, str, str], str]  # (innermost module or None, its path, op) -> seam
Kernel = Callable[[object, tuple], str]  # (op overload, arguments) -> kernel


class Tracer(TorchDispatchMode):
    """Records the target's calls while `rows` is set; PyTorch calls it for every op that runs.

    names: id(module) -> path, "" for the whole model. watch: the (module, op) whose GPU kernels are recorded.
    """

    def __init__(
        self,
        names: dict[int, str],
        owner: Owner,
        kernel: Kernel,
        watch: tuple[str, str] | None = None,
        coarse: bool = False,
    ) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._names, self._owner, self._kernel, self._watch = names, owner, kernel, watch
        self.coarse = coarse
        self._rows: Rows | None = None
        self._modules: list[tuple[torch.nn.Module, str, contextlib.ExitStack]] = []
        self._busy = False

    @contextlib.contextmanager
    def phase(self, rows: Rows | None) -> Iterator[None]:
        """Within this context, record the target's rows as `rows` states; None: the context holds none of its rows."""
        before, self._rows = self._rows, rows
        try:
            with self.again():
                yield
        finally:
            self._rows = before

    def set_rows(self, rows: Rows | None) -> None:
        self._rows = rows

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Stay active inside an op that this mode itself called: PyTorch takes the mode off the stack for the op."""
        if self.coarse or self in _get_current_dispatch_mode_stack():
            yield
        else:
            with self:
                yield

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context, record nothing: the tracer itself computes."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Within this context, module hooks record each module's path and output."""
        if self.coarse:
            yield
            return
        from torch.nn.modules import module

        handles = [
            module.register_module_forward_pre_hook(self._before),
            module.register_module_forward_hook(self._after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._busy or self._rows is None:
            return func(*args, **kwargs)
        name = f"{func.namespace}.{func._schema.name.split('::')[-1]}"
        if self._watch == (self._modules[-1][1] if self._modules else "", name) and torch.cuda.is_available():
            result, kernel = _profiled(func, args, kwargs)
        else:
            result, kernel = func(*args, **kwargs), ""
        short = name.split(".")[-1].lstrip("_")
        if func.is_view or short.startswith(_UNDEFINED):
            return result
        written = [
            value
            for value, declared in zip(args, func._schema.arguments)
            if declared.alias_info is not None and declared.alias_info.is_write
        ]
        written += [
            kwargs[a.name]
            for a in func._schema.arguments
            if a.name in kwargs and a.alias_info is not None and a.alias_info.is_write
        ]
        returned = result if isinstance(result, (tuple, list)) else (result,)
        outputs = [*returned, *(w for w in written if not any(w is r for r in returned))]
        self.record(name, outputs, lambda: kernel or self._kernel(func, args))
        return result

    def record(
        self, op: str, outputs, kernel: Callable[[], str] = str, *, rows: Rows | None = None, module: str | None = None
    ) -> None:
        """Record a digest of the target's rows of each output that has rows."""
        rows = rows or self._rows
        if rows is None:
            return
        innermost, path = self._modules[-1][:2] if self._modules else (None, "")
        path = path or ("model" if innermost is not None else "") if module is None else module
        with self.paused():
            for index, tensor in enumerate(outputs):
                if not isinstance(tensor, torch.Tensor) or not rows.of(tensor):
                    continue
                self.add(
                    op,
                    index,
                    rows,
                    digest_rows(tensor[rows.start : rows.start + rows.count]),
                    tuple(tensor.shape),
                    tuple(tensor.stride()),
                    tensor.dtype,
                    innermost,
                    path,
                    kernel(),
                )

    def add(self, op, index, rows, digests, shape, stride, dtype, innermost, path, kernel="") -> None:
        self.calls.append(
            Call(
                rows.step,
                rows.phase,
                path,
                type(innermost).__name__ if innermost is not None else "",
                op,
                index,
                rows.position,
                digests,
                shape,
                stride,
                str(dtype).removeprefix("torch."),
                self._owner(innermost, path, op),
                kernel,
            )
        )

    def cut(self, step: int, end: int) -> None:
        """Forget the rows of a step at positions from `end` on: rows of drafts that the step did not accept."""
        kept: list[Call] = []
        while self.calls and self.calls[-1].step == step:
            call = self.calls.pop()
            rows = min(call.rows, end - call.position)
            if rows > 0:
                kept.append(msgspec.structs.replace(call, digests=call.digests[: rows * WIDTH]))
        self.calls += kept[::-1]

    def current(self) -> tuple[object, str]:
        """The innermost running module and its path."""
        return self._modules[-1][:2] if self._modules else (None, "")

    @property
    def rows(self) -> Rows | None:
        return self._rows

    def _before(self, module, args) -> None:
        stack = contextlib.ExitStack()
        if self._rows is not None:
            stack.enter_context(self.again())
        outer = self._modules[-1][1] if self._modules else ""
        path = self._names.get(id(module), outer)
        # A module that several layers share gets the path of the layer in which it runs.
        if outer and path != outer and not path.startswith(f"{outer}."):
            path = f"{outer}.{path.rsplit('.', 1)[-1]}"
        self._modules.append((module, path, stack))

    def _after(self, module, args, output) -> None:
        if not self._modules:  # the hooks were installed while the module's forward ran
            return
        flat = output if isinstance(output, (tuple, list)) else (output,)
        self.record(MODULE, flat)
        self._modules.pop()[2].close()


def digest_rows(rows: torch.Tensor) -> bytes:
    """WIDTH bytes for each row of a tensor [rows, ...]."""
    # PyTorch calls a single element contiguous, whatever its stride, and does not view its bytes.
    held = rows.detach().cpu().clone(memory_format=torch.contiguous_format)
    count = held.shape[0]
    if not count or not held.numel():
        return hashlib.blake2b(b"", digest_size=WIDTH).digest() * count
    data = held.reshape(count, -1).view(torch.uint8).numpy()
    return b"".join(hashlib.blake2b(row.tobytes(), digest_size=WIDTH).digest() for row in data)


def chain(digests: bytes) -> list[bytes]:
    """A list whose item i is a digest of the first i digests."""
    chained = [b"\0" * WIDTH]
    for at in range(0, len(digests), WIDTH):
        chained.append(hashlib.blake2b(chained[-1] + digests[at : at + WIDTH], digest_size=WIDTH).digest())
    return chained


def _profiled(func, args, kwargs):
    """The op's result, and the names of the GPU kernels that the op ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as held:
        result = func(*args, **kwargs)
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in held.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] = times.get(event.name, 0.0) + event.time_range.elapsed_us()
    return result, kernels(sorted(times, key=lambda name: -times[name]))


_SHOWN, _WIDE = 3, 90
_NOISE = re.compile(r"^void |at::native::|\(anonymous namespace\)::")


def kernels(names: Sequence[str]) -> str:
    """GPU kernels as text: the first names, without namespaces, cut to a width. names: the slowest kernel first."""
    chosen = [name for name in names if not name.startswith(("Memcpy", "Memset"))] or list(names)
    short = [_NOISE.sub("", name) for name in chosen]
    shown = [name if len(name) <= _WIDE else f"{name[:_WIDE]}..." for name in short[:_SHOWN]]
    more = f" and {len(short) - _SHOWN} more" if len(short) > _SHOWN else ""
    return " + ".join(shown) + more
