"""Calls of bi_patch's operators that go straight to their function, past PyTorch's dispatcher.

Compiled code calls torch.ops.bi_patch.<name>.default. The dispatcher packs every argument and unpacks it, and each
access to a parameter of vLLM's calls Python. Together that takes the host longer than the function itself.

Where the dispatcher would only call the function, `_Direct` calls it: in inference mode, for tensors of the function's
device, with no mode or transform that wants to hear of operators, and for types that have no own dispatch. Any other
call takes PyTorch's way, e.g. while torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_C = torch._C
# Its __torch_function__ only calls the one of torch.nn.Parameter.
_PARAMETERS = "vllm.model_executor.parameter"
_OTHERS = (int, float, bool, str, type(None), torch.dtype)
_plain: dict[type, bool] = {}


class _Direct(torch._ops.OpOverload):
    """An operator whose `bi_patch_call` is (its function, whether a tensor is on its device, number of arguments)."""

    def __call__(self, /, *args, **kwargs):
        run, here, count = self.bi_patch_call
        if (
            kwargs
            or len(args) != count
            or not torch.is_inference_mode_enabled()
            or _C._len_torch_dispatch_stack()
            or _C._is_torch_function_mode_enabled()
            or _C._functorch.peek_interpreter_stack() is not None
            or not _are_plain(args)
            or not here(args[0])
        ):
            return super().__call__(*args, **kwargs)
        with _C.DisableTorchFunctionSubclass():
            return run(*args)


def shorten(operator: torch._ops.OpOverload, run: Callable, key: str) -> None:
    """Let `operator` call `run` itself where that is all its dispatch on `key` ("CUDA" or "CPU") does.

    Does nothing for an operator that changes an argument, and for one whose first argument is no tensor.
    """
    arguments = operator._schema.arguments
    if operator._schema.is_mutable or not arguments or str(arguments[0].type) != "Tensor":
        return
    here = {"CUDA": lambda x: x.is_cuda, "CPU": lambda x: x.is_cpu}[key]
    operator.bi_patch_call = run, here, len(arguments)
    operator.__class__ = _Direct


def _are_plain(args: tuple) -> bool:
    for value in args:
        kind = type(value)
        plain = _plain.get(kind)
        if plain is None:
            plain = _plain[kind] = _is_plain(kind)
        if not plain:
            return False
    return True


def _is_plain(kind: type) -> bool:
    """Whether PyTorch's dispatcher calls nothing of this type's own."""
    if not issubclass(kind, torch.Tensor):
        return kind in _OTHERS
    known = kind in (torch.Tensor, torch.nn.Parameter) or kind.__module__ == _PARAMETERS
    return known and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
