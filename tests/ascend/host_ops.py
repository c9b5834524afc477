"""PyTorch operators that move or combine single elements, on the stub NPU: computed by PyTorch on the same
memory.

On the stub an NPU tensor's memory is the host's, so a CPU tensor over it is a view. Listed are only
operators that sum
nothing: what the routes must serve is never among them, so a test that computes has gone through the routes.
"""

import ctypes

import torch
import torch_npu  # noqa: F401  before any kernel is put in the place of its own

POINTWISE = """
copy_ fill_.Scalar zero_ add.Tensor add_.Tensor add.Scalar add_.Scalar sub.Tensor mul.Tensor mul_.Tensor
mul.Scalar
div.Tensor div_.Tensor neg abs sigmoid silu exp rsqrt pow.Tensor_Scalar eq.Tensor eq.Scalar lt.Tensor
le.Tensor ge.Tensor gt.Tensor
clamp where.self index_select embedding cat stack argmax sort.stable arange.start_step masked_fill_.Scalar
masked_fill.Scalar
rsub.Scalar rsub.Tensor sub.Scalar scatter.src scatter_.src masked_fill_.Tensor lt.Scalar gt.Scalar lt_.Tensor
_index_put_impl_ index.Tensor gather bitwise_not bitwise_and.Tensor repeat isfinite ne.Scalar clone
""".split()

_libraries: list[torch.library.Library] = []


def view(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over an NPU tensor's memory; others as they are."""
    if tensor.device.type != "npu":
        return tensor
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    base = torch.frombuffer(memory, dtype=torch.uint8)
    base = base[: storage.nbytes() // tensor.element_size() * tensor.element_size()].view(tensor.dtype)
    return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _map(value, change):
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, change) for v in value)
    return value


def _onto_npu(value: torch.Tensor) -> torch.Tensor:
    out = torch.empty(value.shape, dtype=value.dtype, device="npu")
    view(out).copy_(value)
    return out


def _host(name: str):
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
    changes = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]

    def compute(*args, **kwargs):
        for key in ("device", "pin_memory", "layout"):
            kwargs.pop(key, None)
        made = op(*_map(args, view), **{k: _map(v, view) for k, v in kwargs.items()})
        return args[0] if changes else _map(made, _onto_npu)

    return compute


def install() -> None:
    """Register the list for the NPU in this process. Idempotent."""
    if _libraries:
        return
    library = torch.library.Library("aten", "IMPL")
    for name in POINTWISE:
        library.impl(name, _host(name), "PrivateUse1")
    _libraries.append(library)
