"""A trace of one request through the engine: a digest of its rows after every op and every module.

A row is found by its token's absolute position in the request, so that chunked prefill, decode and batches of any
size line up. The engine runs eagerly while it is traced. Works on one process; ranks above 0 are not traced.
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
FORWARD, LOGITS, LOGPROBS, SAMPLE, RETURNED = PHASES = ("forward", "logits", "logprobs", "sample", "returned")
CACHE = "KV cache"  # an entry for what a layer is about to read from its cache
MODULE = "(module)"  # stands for an op where an entry is a module's own output
# Memory that nothing was written to yet, and draws that need not be the request's own.
_UNDEFINED = ("empty", "rand", "exponential", "uniform", "normal", "bernoulli")


class Call(msgspec.Struct, frozen=True, array_like=True):
    """One output of one op or module, as far as it belongs to the traced request.

    step: engine step. position: absolute position of the first row's token. digests: WIDTH bytes for each row.
    shape, stride: of the whole output, so shape[0] is M. seam: who owns the op. kernel: what served it.
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
    """The calls of one request in execution order. coarse: only where compiled code ends, not inside it."""

    calls: list[Call]
    coarse: bool = False


@dataclass(frozen=True)
class Rows:
    """Where the request's rows are in the tensors of one phase of one step.

    sizes: leading dimensions that mean rows of this phase. start, count: the request's rows. position: of the first.
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
    """Records calls while `rows` is set.

    names: id(module) -> path, "" for the whole model. watch: (module, op) whose GPU kernels are named.
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
        """Record what runs inside as `rows` say; None: nothing of the request runs inside."""
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
        """Be active inside an op that was called from this very mode, which has left the stack for it."""
        if self.coarse or self in _get_current_dispatch_mode_stack():
            yield
        else:
            with self:
                yield

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What the tracing itself computes inside is not recorded."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Module hooks are on inside."""
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
        """Digest the request's rows of each output that has rows."""
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
        # A module that several layers share is named by where it runs.
        if outer and path != outer and not path.startswith(f"{outer}."):
            path = f"{outer}.{path.rsplit('.', 1)[-1]}"
        self._modules.append((module, path, stack))

    def _after(self, module, args, output) -> None:
        if not self._modules:  # hooks were set inside the module's forward
            return
        flat = output if isinstance(output, (tuple, list)) else (output,)
        self.record(MODULE, flat)
        self._modules.pop()[2].close()


def digest_rows(rows: torch.Tensor) -> bytes:
    """WIDTH bytes for each row of a tensor [rows, ...]."""
    held = rows.detach().contiguous().cpu()
    count = held.shape[0]
    if not count or not held.numel():
        return hashlib.blake2b(b"", digest_size=WIDTH).digest() * count
    data = held.reshape(count, -1).view(torch.uint8).numpy()
    return b"".join(hashlib.blake2b(row.tobytes(), digest_size=WIDTH).digest() for row in data)


def chain(digests: bytes) -> list[bytes]:
    """[i] stands for the first i digests."""
    chained = [b"\0" * WIDTH]
    for at in range(0, len(digests), WIDTH):
        chained.append(hashlib.blake2b(chained[-1] + digests[at : at + WIDTH], digest_size=WIDTH).digest())
    return chained


def _profiled(func, args, kwargs):
    """The result and the names of the kernels that ran on the GPU for it."""
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
    """Names of GPU kernels, the most important first, as words: the first few, without namespaces, cut to a width."""
    chosen = [name for name in names if not name.startswith(("Memcpy", "Memset"))] or list(names)
    short = [_NOISE.sub("", name) for name in chosen]
    shown = [name if len(name) <= _WIDE else f"{name[:_WIDE]}..." for name in short[:_SHOWN]]
    more = f" and {len(short) - _SHOWN} more" if len(short) > _SHOWN else ""
    return " + ".join(shown) + more
