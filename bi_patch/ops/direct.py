"""Calls of bi_patch's operators that go straight to their function, past PyTorch's dispatcher.

Compiled code calls torch.ops.bi_patch.<name>.default. The dispatcher packs every argument and unpacks it, and each
access to a parameter of vLLM's calls Python. Together that takes the host longer than the function itself.

Where the dispatcher would only call the function, `_Direct` calls it: in inference mode, for tensors of the function's
device, with no mode or transform that wants to hear of operators, and for types that have no own dispatch. Any other
call takes PyTorch's way, e.g. while torch.compile traces. A profiler sees only the kernels of a direct call.

The dispatcher would also negate a view that PyTorch negates later, which only the imaginary part of a conjugate is. A
direct call does not look for one, since vLLM makes none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_C = torch._C
# Its __torch_function__ only calls the one of torch.nn.Parameter.
_PARAMETERS = "vllm.model_executor.parameter"
# By the type in a schema. The dispatcher converts other values, e.g. an integer to a float.
_KINDS = {"Tensor": torch.Tensor, "float": float, "int": int, "bool": bool, "str": str, "ScalarType": torch.dtype}
_plain: dict[type, bool] = {}


class _Direct(torch._ops.OpOverload):
    """An operator whose `bi_patch_call` is (its function, whether a tensor is on its device, kinds of its arguments).

    The kind of an argument is (type, whether it may be None).
    """

    def __call__(self, /, *args, **kwargs):
        run, here, kinds = self.bi_patch_call
        if (
            kwargs
            or len(args) != len(kinds)
            or not torch.is_inference_mode_enabled()
            or _C._len_torch_dispatch_stack()
            or _C._is_torch_function_mode_enabled()
            or _C._functorch.peek_interpreter_stack() is not None
            or not _are_plain(args, kinds)
            or not here(args[0])
        ):
            return super().__call__(*args, **kwargs)
        with _C.DisableTorchFunctionSubclass():
            return run(*args)


def shorten(operator: torch._ops.OpOverload, run: Callable, key: str) -> None:
    """Let `operator` call `run` itself where that is all its dispatch on `key` ("CUDA" or "CPU") does.

    Does nothing for an operator that changes an argument, for one whose first argument is no tensor, and for one with
    an argument that is neither a tensor nor in `_KINDS`, e.g. a list.
    """
    arguments = operator._schema.arguments
    if operator._schema.is_mutable or not arguments or str(arguments[0].type) != "Tensor":
        return
    kinds = tuple(_kind(str(argument.real_type)) for argument in arguments)
    if any(kind is None for kind, _ in kinds):
        return
    here = {"CUDA": lambda x: x.is_cuda, "CPU": lambda x: x.is_cpu}[key]
    operator.bi_patch_call = run, here, kinds
    operator.__class__ = _Direct


def _kind(name: str) -> tuple[type | None, bool]:
    inner = name.removeprefix("Optional[").removesuffix("]")
    return _KINDS.get(inner), inner != name


def _are_plain(args: tuple, kinds: tuple) -> bool:
    """Whether the dispatcher would hand on each argument as it is."""
    for value, (kind, optional) in zip(args, kinds, strict=True):
        found = type(value)
        if found is kind or (value is None and optional):
            continue
        if kind is not torch.Tensor:
            return False
        plain = _plain.get(found)
        if plain is None:
            plain = _plain[found] = _is_plain(found)
        if not plain:
            return False
    return True


def _is_plain(kind: type) -> bool:
    """Whether PyTorch's dispatcher calls nothing of this type of tensor's own."""
    known = kind is torch.nn.Parameter or kind.__module__ == _PARAMETERS
    return known and issubclass(kind, torch.Tensor) and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
