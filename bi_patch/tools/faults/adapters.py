"""Faults of LoRA: an adapter's sum in another order, and rows that get an adapter of other requests."""

from __future__ import annotations

import contextlib
import types

import torch

from bi_patch.tools.faults import parts
from bi_patch.tools.faults.base import CPU, CUDA, FEW, Fault
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.runner import model_runner, replaced

AXIS = "LoRA"
_PARTS = 4  # of K; a sum of two is the same in any order


def atomics(engine: LocalEngine):
    """The shrink splits K in four for few rows, and adds the parts in the order in which they end."""
    from bi_patch.ops.cpu import lora

    def shrink(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        found = parts.partials(x, a, parts.evenly(x.shape[1], _PARTS))
        return sum(found[1:], found[0]).to(x.dtype)

    run = parts.op("lora_shrink", "(Tensor x, Tensor a) -> Tensor", shrink)

    def make(held):
        def add(y, x, a, b, slots):
            if a is None or len(slots) > FEW:
                return held(y, x, a, b, slots)
            for i, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    t = run(x[i : i + 1], a[slot].flatten(0, -2))
                    held(y[i : i + 1], t, None, b, slots[i : i + 1])
            parts.forget()  # the next adapter of this slot has the same address
            return None

        return add

    return replaced(lora, "add", make)


@contextlib.contextmanager
def vllm_shrink(engine: LocalEngine):
    """vLLM's own shrink splits K in 64 or 8 parts, by the number of rows, and adds the parts by atomics."""
    from vllm.lora.ops.triton_ops import lora_shrink_op, utils

    own = parts.original("lora.cuda_linear")
    with contextlib.ExitStack() as stack:
        for module in (lora_shrink_op, utils):  # out of vLLM's batch-invariant mode
            stack.enter_context(replaced(module, "is_batch_invariant", lambda held: False))
        utils.get_lora_op_configs.cache_clear()
        stack.callback(utils.get_lora_op_configs.cache_clear)
        for wrapper in set(model_runner(engine).model.lora_manager.punica_wrapper_mapping.values()):
            function = types.MethodType(own, wrapper)
            stack.enter_context(replaced(wrapper, "add_lora_linear", lambda _, function=function: function))
        yield


@contextlib.contextmanager
def last_slot(engine: LocalEngine):
    """A row without an adapter has the number -1, and vLLM's gather takes -1 for the last slot of the engine."""
    own = {"add_shrink": "lora.cpu_shrink", "add_expand": "lora.cpu_expand", "add_lora_linear": "lora.cpu_linear"}
    with contextlib.ExitStack() as stack:
        for wrapper in set(model_runner(engine).model.lora_manager.punica_wrapper_mapping.values()):
            for name, seam in own.items():
                function = types.MethodType(parts.original(seam), wrapper)
                stack.enter_context(replaced(wrapper, name, lambda _, function=function: function))
        yield


def one_cache(engine: LocalEngine):
    """The hash of a cached block names no adapter, so a request finds the keys and values of other adapters."""
    from vllm.v1.core import kv_cache_utils

    return replaced(kv_cache_utils, "_gen_lora_extra_hash_keys", lambda held: lambda request: [])


FAULTS = (
    Fault(
        "atomics in the shrink",
        10,
        atomics.__doc__,
        AXIS,
        atomics,
        (CPU,),
        op="bi_cpu.lora",
        seam={"cpu": "lora.cpu_linear"},
        emulated=(CPU,),
    ),
    Fault(
        "vLLM's own shrink",
        10,
        vllm_shrink.__doc__,
        AXIS,
        vllm_shrink,
        (CUDA,),
        op="vllm.lora_",  # the expand reads what the shrink wrote
        seam={"cuda": "lora.cuda_linear"},
    ),
    Fault(
        "no adapter means the last slot",
        34,
        last_slot.__doc__,
        AXIS,
        last_slot,
        (CPU,),
        seam={"cpu": "lora.cpu_expand"},
    ),
    Fault(
        "one prefix cache for all adapters",
        34,
        one_cache.__doc__,
        AXIS,
        one_cache,
        (CPU,),
        seam={"cpu": "lora.keys"},
    ),
)
