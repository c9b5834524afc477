"""Makes weights instead of loading them: seeded random weights for a folder without weights, and rows tied on purpose.

vLLM's own dummy weights are within 0.001 of zero: so small that rounding hides most differences.
"""

from __future__ import annotations

import functools


def make_random(seed: int) -> None:
    """Make load_format="dummy" fill models with `fill`, in this process and in workers that vLLM's executor mp starts.

    Call before the engine starts.
    """
    _in_workers(seed)
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    original = getattr(DummyModelLoader.load_weights, "__wrapped__", DummyModelLoader.load_weights)

    @functools.wraps(original)
    def load_weights(self, model, *args, **kwargs):
        original(self, model, *args, **kwargs)  # also sets up what quantized layers need besides values
        fill(model, seed, _rank())
        model.bi_patch_filled = True

    DummyModelLoader.load_weights = load_weights


def _in_workers(seed: int) -> None:
    from vllm.v1.executor.multiproc_executor import WorkerProc

    if not isinstance(WorkerProc.worker_main, functools.partial):
        _start.append(WorkerProc.worker_main)
    WorkerProc.worker_main = functools.partial(_worker_main, seed)


_start: list = []  # vLLM's function that a worker's process runs


def _worker_main(seed: int, *args, **kwargs):
    """In a worker's process, which may be no fork."""
    make_random(seed)
    return _start[0](*args, **kwargs)


def filled(worker) -> bool:
    """In a worker: whether its model was filled. A worker of another executor would keep weights near zero."""
    return getattr(worker.get_model(), "bi_patch_filled", False)


def _rank() -> int | None:
    """This process's place among tensor-parallel ranks, None if it is the only one."""
    from vllm.distributed import parallel_state

    several = parallel_state.get_tensor_model_parallel_world_size() > 1
    return parallel_state.get_tensor_model_parallel_rank() if several else None


def make_tied() -> None:
    """Make this process call `tie` on every model that it loads, before weights are packed. Call before the engine."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    for loader in _subclasses(BaseModelLoader):
        original = loader.__dict__.get("load_weights")
        if original is not None:
            loader.load_weights = _then_tied(original)


# The standard deviation of 8-bit floats: few of them are subnormal, and none overflows.
_EIGHTH = 16.0


def fill(model, seed: int, rank: int | None = None) -> None:
    """Fill a model: matrices normal(0, fan_in ** -0.5), biases normal(0, 0.5), norms normal(1, 0.1), rates of
    decay uniform(-2, 0).

    Packed integers get random bits. Their scales, and those of 8-bit floats, give the weights about the spread of other
    matrices. rank: of several tensor-parallel ranks. What they cut differs from rank to rank, and the rest is equal.
    """
    import torch

    generators: dict[object, torch.Generator] = {}
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        value = parameter.data
        layer = model.get_submodule(name.rpartition(".")[0])
        own = 1 + rank if rank is not None and _is_cut(layer, name) else 0
        generator = generators.get((value.device, own))
        if generator is None:
            generator = generators[value.device, own] = torch.Generator(value.device).manual_seed(seed + own)
        if not value.is_floating_point():
            if name.endswith(_EXPONENTS):
                _fill_exponents(named, name, generator)
            elif name.endswith(_PACKED) and value.ndim >= 2:
                _fill_integers(value, generator)
            continue
        if (size := _nvfp4_size(named, name)) and _fill_nvfp4(name, value, size, generator):
            continue
        if name.endswith(_SCALES) and (step := _step(layer)):
            noise = torch.rand(value.shape, generator=generator, device=value.device)
            value.copy_(step * (0.5 + noise))
            continue
        scaled = _scaled(named, name)
        bits = _packed_bits(layer)
        if name.endswith(_OF_EXPERTS) and (size := _packed_size(named, name, bits)):
            noise = torch.rand(value.shape, generator=generator, device=value.device)
            value.copy_(size**-0.5 / _SPREADS[bits] * (0.5 + noise))
            continue
        if value.element_size() == 1 and value.ndim == 3:  # experts, one by one: fp32 values of all would not fit
            for part in value:
                part.copy_(torch.empty(part.shape, device=value.device).normal_(0, _EIGHTH, generator=generator))
            continue
        wide = value if value.element_size() > 1 else torch.empty(value.shape, device=value.device)
        if name.endswith((".k_scale", ".v_scale")) and value.numel() > 1:  # each key head its own
            wide.uniform_(0.01, 0.03, generator=generator)
        elif name.endswith(("input_scale", ".k_scale", ".v_scale")):
            wide.fill_(0.02)
        elif scaled is not None:
            wide.uniform_(0.5, 1.5, generator=generator).mul_(scaled.shape[-1] ** -0.5 / _EIGHTH)
        elif value.element_size() == 1:
            wide.normal_(0, _EIGHTH, generator=generator)
        elif value.ndim >= 2 and name.endswith(".A"):  # Mamba 1's rates of decay: a state with others grows without end
            wide.uniform_(-2, 0, generator=generator)
        elif value.ndim >= 2:
            wide.normal_(0, value.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            wide.normal_(0, 0.5, generator=generator)
        elif "norm" in name:
            wide.normal_(1, 0.1, generator=generator)
        else:
            continue
        if wide is not value:
            value.copy_(wide)


_EXPERTS = (".w13_", ".w2_")
_PACKED = (".weight", ".weight_packed", ".weight_zero_point", ".qweight", ".qzeros")
_PACKED += tuple(part + name[1:] for part in _EXPERTS for name in _PACKED)
_SCALES = (".weight_scale", ".scales")
_OF_EXPERTS = tuple(part + name[1:] for part in _EXPERTS for name in _SCALES)
_EXPONENTS = tuple(f"{part}weight_scale" for part in _EXPERTS)  # MXFP4: 8 bits, for 32 elements of K
_FOUR_BIT_FLOATS = 2.9  # the spread of random e2m1
_MOST_NVFP4 = 6 * 448  # the greatest e2m1 times the greatest e4m3
_SPREADS = {8: 73.0, 4: 4.6}  # of random integers of so many bits


_CUT = {"LinearBase", "VocabParallelEmbedding", "MiniMaxText01RMSNormTP"}


def _is_cut(layer, name: str) -> bool:
    """Whether tensor-parallel ranks hold a part each of a parameter."""
    kinds = {kind.__name__ for kind in type(layer).__mro__}
    whole = "ReplicatedLinear" in kinds or getattr(layer, "tp_size", 2) == 1
    return any(part in name for part in _EXPERTS) or bool(kinds & _CUT) and not whole


def _fill_integers(value, generator) -> None:
    """Random bits. dummy weights would leave what was in memory, and other bits at the next start."""
    import torch

    held = torch.iinfo(value.dtype)
    low = held.min + (held.bits == 8)  # no -128: such weights are symmetric
    made = torch.randint(low, held.max, value.shape, generator=generator, device=value.device, dtype=torch.int64)
    value.copy_(made.to(value.dtype))


def _fill_exponents(named, name: str, generator) -> None:
    """Exponents of MXFP4 that give its weights a spread of about fan_in ** -0.5."""
    import math

    import torch

    value = named[name].data
    middle = 127 + round(math.log2(_packed_size(named, name) ** -0.5 / _FOUR_BIT_FLOATS))
    made = torch.randint(middle - 1, middle + 2, value.shape, generator=generator, device=value.device)
    value.copy_(made.to(value.dtype))


def _nvfp4_size(named, name: str) -> int:
    """K of the NVFP4 weights that a parameter scales, 0 if it scales no such weights."""
    part = next((part for part in _EXPERTS if part in name), ".")
    stem = name[: name.rindex(part) + len(part)] if part in name else ""
    for scale, packed in (("weight_global_scale", "weight_packed"), ("weight_scale_2", "weight")):
        if f"{stem}{scale}" in named and f"{stem}{packed}" in named:
            return named[f"{stem}{packed}"].shape[-1] * 2
    return 0


def _fill_nvfp4(name: str, value, size: int, generator) -> bool:
    """Fill scales that give NVFP4 weights a spread of size ** -0.5: of groups about 32, and the one of all. The latter
    divides in compressed-tensors, and multiplies elsewhere. So does the one of activations, for values of up to 8."""
    import torch

    for part in _EXPERTS:
        name = name.replace(part, ".")
    if name.endswith(".weight_scale"):
        noise = torch.rand(value.shape, generator=generator, device=value.device)
        value.copy_(32 * (0.5 + noise))
    elif name.endswith(".weight_global_scale"):
        value.fill_(32 * _FOUR_BIT_FLOATS * size**0.5)
    elif name.endswith(".weight_scale_2"):
        value.fill_(1 / (32 * _FOUR_BIT_FLOATS * size**0.5))
    elif name.endswith(".input_global_scale"):
        value.fill_(_MOST_NVFP4 / 8)
    elif name.endswith((".input_scale", ".input_scale_2")):
        value.fill_(8 / _MOST_NVFP4)
    else:
        return False
    return True


def _packed_size(named, name: str, bits: int = 4) -> int:
    """K of the packed weights of experts that a parameter scales, 0 if it scales no such weights."""
    part = next(part for part in _EXPERTS if part in name)
    stem = name[: name.rindex(part) + len(part)]
    for kind, axis in (("weight_packed", 2), ("qweight", 1), ("weight", 2)):
        found = named.get(stem + kind)
        if found is not None and not found.is_floating_point():
            last = found.element_size() == 1  # bytes lie along K in every layout
            return found.shape[2 if last else axis] * found.element_size() * 8 // bits
    return 0


def _step(layer) -> float:
    """The scale that gives random integers of a quantized linear a spread of fan_in ** -0.5; 0 for other layers."""
    size = getattr(layer, "input_size_per_partition", 0)
    if not size:
        return 0.0
    integers = [p for p in layer.parameters() if not p.is_floating_point() and p.ndim >= 2]
    bits = {1: 8, 4: _packed_bits(layer)}.get(integers[0].element_size(), 0) if integers else 0
    spread = _SPREADS.get(bits, 0.0)
    return size**-0.5 / spread if spread else 0.0


def _packed_bits(layer) -> int:
    """The bits of integers that a layer packs into words of 32."""
    scheme = getattr(getattr(layer, "scheme", None), "num_bits", None)
    method = getattr(layer, "quant_method", None)
    return scheme or getattr(getattr(method, "quant_config", None), "weight_bits", None) or 4


def _scaled(named, name: str):
    """The 8-bit floats that a parameter is the scale of, else None. named: the model's parameters by name."""
    for suffix in ("_scale_inv", "_scale"):
        found = named.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if found is not None and found.is_floating_point() and found.element_size() == 1:
            return found
    return None


def tie(model) -> None:
    """Make rows 2i and 2i + 1 equal in the output head and in every router: every best value becomes an exact tie."""
    for name, parameter in model.named_parameters():
        value = parameter.data
        if not _is_scored(name) or value.ndim != 2 or not value.is_floating_point():
            continue
        even = value.shape[0] // 2 * 2
        value[1:even:2] = value[0:even:2]


def _is_scored(name: str) -> bool:
    """Whether the model picks among the rows of this parameter: the head (also a tied embedding) and routers."""
    return name.endswith(
        ("lm_head.weight", "embed_tokens.weight", "mlp.gate.weight", "router.weight", "block_sparse_moe.gate.weight")
    )


def _then_tied(original):
    @functools.wraps(original)
    def load_weights(self, model, *args, **kwargs):
        made = original(self, model, *args, **kwargs)
        tie(model)
        return made

    return load_weights


def _subclasses(kind: type) -> list[type]:
    from vllm.model_executor.model_loader import default_loader, dummy_loader  # noqa: F401  imported so that __subclasses__ lists them

    found = [kind]
    for each in found:
        found += each.__subclasses__()
    return list(dict.fromkeys(found))
