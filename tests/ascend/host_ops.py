"""PyTorch operators that move or combine single elements: on the stub NPU, PyTorch's CPU kernels compute them.

On the stub, an NPU tensor's memory is host memory, so a CPU tensor can view it. The list holds only operators that sum
no floating-point numbers. bi_patch must serve all others, so a test that computes a sum has used bi_patch's operators.
"""

import ctypes

import torch
import torch_npu  # noqa: F401  before `install` replaces torch_npu's kernels
import triton.runtime.interpreter as interpreter

POINTWISE = """
copy_ fill_.Scalar zero_ add.Tensor add_.Tensor add.Scalar add_.Scalar sub.Tensor mul.Tensor mul_.Tensor
mul.Scalar
div.Tensor div_.Tensor neg abs sigmoid silu exp rsqrt pow.Tensor_Scalar eq.Tensor eq.Scalar lt.Tensor
le.Tensor ge.Tensor gt.Tensor
clamp where.self index_select embedding cat stack argmax sort.stable arange.start_step masked_fill_.Scalar
masked_fill.Scalar
rsub.Scalar rsub.Tensor sub.Scalar scatter.src scatter_.src masked_fill_.Tensor lt.Scalar gt.Scalar lt_.Tensor
_index_put_impl_ index.Tensor gather bitwise_not bitwise_and.Tensor repeat isfinite ne.Scalar clone
zeros zeros_like ones pow.Scalar reciprocal arange cos sin rand randn uniform_ normal_
""".split()
# Sums of integers are exact in any order. With floating-point numbers they fail, like every native kernel on the stub.
INTEGER_SUMS = "sum sum.dim_IntList cumsum".split()

_libraries: list[torch.library.Library] = []


def view(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over an NPU tensor's memory. Other values are returned as they are."""
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


def _integers(name: str):
    compute = _host(name)

    def sum_integers(x, *args, **kwargs):
        if x.is_floating_point():
            raise RuntimeError(f"aten::{name}: no kernel runs on the stub")
        return compute(x, *args, **kwargs)

    return sum_integers


def _reshape_and_cache(key, value, key_cache, value_cache, slot_indices) -> None:
    """Write rows of keys and values into the slots of a paged cache."""
    slots = view(slot_indices).long()
    for rows, cache in ((key, key_cache), (value, value_cache)):
        held = view(cache)
        held[slots // held.shape[1], slots % held.shape[1]] = view(rows).view(len(slots), *held.shape[2:])


def _init_routing(x, expert_idx, *, expert_num=-1, active_expert_range=(), **options):
    """The rows sorted by expert (a stable sort), the place of each (token, choice), and the rows of each expert."""
    chosen = view(expert_idx).flatten().long()
    order = chosen.argsort(stable=True)
    places = torch.empty_like(order, dtype=torch.int32)
    places[order] = torch.arange(len(order), dtype=torch.int32)
    rows = view(x)[order // expert_idx.shape[1]]
    counts = torch.bincount(chosen, minlength=expert_num)
    return tuple(_onto_npu(made) for made in (rows, places, counts, torch.empty(0)))


_draws: dict[int, tuple[torch.Generator, torch.Generator]] = {}  # both kept, so that no id is given twice


def _exponential(self, lambd=1.0, *, generator=None):
    """As on an NPU, a generator's draws depend on its seed and on the number of its earlier draws."""
    if generator is not None:
        seeded = torch.Generator().manual_seed(generator.initial_seed())
        generator = _draws.setdefault(id(generator), (generator, seeded))[1]
    view(self).exponential_(lambd, generator=generator)
    return self


def _in_place(self, args, kwargs):
    """Let the interpreter work on the tensors' own memory. By itself it copies tensors and loses views' strides."""
    return [view(a) if isinstance(a, torch.Tensor) else a for a in args], {
        name: view(a) if isinstance(a, torch.Tensor) else a for name, a in kwargs.items()
    }


def install() -> None:
    """Register the operators of this module for the NPU in this process. A second call does nothing."""
    if _libraries:
        return
    library = torch.library.Library("aten", "IMPL")
    for name in POINTWISE:
        library.impl(name, _host(name), "PrivateUse1")
    for name in INTEGER_SUMS:
        library.impl(name, _integers(name), "PrivateUse1")
    library.impl("exponential_", _exponential, "PrivateUse1")
    cache, routing = torch.library.Library("atb", "IMPL"), torch.library.Library("npu", "IMPL")
    cache.impl("_npu_reshape_and_cache", _reshape_and_cache, "PrivateUse1")
    routing.impl("npu_moe_init_routing_v2", _init_routing, "PrivateUse1")
    _libraries.extend((library, cache, routing))
    interpreter.GridExecutor._init_args_hst = _in_place
    interpreter.GridExecutor._restore_args_dev = lambda *args: None
