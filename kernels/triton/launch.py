"""Launches a compiled Triton kernel again without Triton's own dispatch.

Triton's dispatch binds and classifies every argument anew at each launch, which takes the host longer than a small
kernel takes the GPU. A `Launcher` asks Triton once for each class of arguments and keeps the compiled kernel that
Triton took. Later calls of this class pass the arguments straight to it. So the same compiled code serves as before.

Triton makes another kernel for other types, for constants, for an integer that is 1, a multiple of 16 or too large for
32 bits, and for addresses that are no multiples of 16. A class holds all integers but one as they are. Calls that have
unaligned addresses, a Triton release whose launches nobody compared, or a profiler's hook go through Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

# The Triton releases that call a compiled kernel as `Launcher.__call__` does.
RELEASES = ("3.6",)
_MOST = 256  # kept classes of one kernel; more would mean that integers change from call to call
_MOST_ROWS = 1 << 31
_known = triton.__version__.rpartition(".")[0] in RELEASES

# PyTorch has no public function that allocates as fast, and `empty` runs once for each kernel of a step.
_allocate = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None) if torch.version.cuda else None
# Public torch.cuda.current_device also asks at each call whether CUDA is ready.
_current_device = getattr(torch._C, "_cuda_getDevice", None)


class Launcher:
    """One kernel, whose parameters are addresses, then numbers, then constants.

    kernel: a function of `triton.jit`.
    """

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self._held: dict[tuple, tuple] = {}

    def __call__(
        self,
        grid: tuple[int, int],
        tensors: tuple[torch.Tensor, ...],
        rows: int,
        numbers: tuple[int | float, ...],
        constants: tuple[int | bool, ...],
        warps: int,
    ) -> None:
        """Launch kernel(*tensors, rows, *numbers, *constants) on the current device and stream.

        grid: programs, all above 0. rows: the one number that changes from call to call. numbers: floats stand where
        the kernel takes floats.
        """
        at = [tensor.data_ptr() for tensor in tensors]
        together = 0
        for address in at:
            together |= address
        device = tensors[0].get_device()
        key = (device, rows == 1, not rows & 15, numbers, constants, warps, *[tensor.dtype for tensor in tensors])
        held = self._held.get(key)
        if held is None or together & 15 or rows >= _MOST_ROWS or _watched():
            self._ask(key, grid, tensors, (rows, *numbers, *constants), warps, not together & 15)
            return
        run, function, metadata, current_device, current_stream = held
        if current_device() != device:
            self._ask(key, grid, tensors, (rows, *numbers, *constants), warps, False)
            return
        stream = current_stream(device)
        run(grid[0], grid[1], 1, stream, function, metadata, None, None, None, *at, rows, *numbers, *constants)

    def _ask(self, key: tuple, grid, tensors, others: tuple, warps: int, keep: bool) -> None:
        """Launch through Triton, and keep the kernel that it takes."""
        found = self.kernel[grid](*tensors, *others, num_warps=warps)
        keep = keep and _known and tensors[0].is_cuda and others[0] < _MOST_ROWS and len(self._held) < _MOST
        # While bi_patch compiles ahead, Triton launches nothing and returns other objects.
        if keep and type(found).__name__ == "CompiledKernel" and not self.kernel.pre_run_hooks:
            driver = triton.runtime.driver.active
            if driver.get_current_device() == key[0]:
                self._held[key] = (
                    found.run,
                    found.function,
                    found.packed_metadata,
                    driver.get_current_device,
                    driver.get_current_stream,
                )


def empty(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """An uninitialized contiguous tensor with the type and the device of x.

    PyTorch's own functions read options first, which takes several times as long. Compiled code allocates as here.
    """
    if _allocate is None or x.get_device() != _current_device():
        return x.new_empty(shape)
    strides, step = (), 1
    for size in reversed(shape):
        strides = (step, *strides)
        step *= max(size, 1)
    return _allocate(tuple(shape), strides, x.dtype)


def _watched() -> bool:
    """Whether somebody wants to hear of launches, e.g. Triton's profiler."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
