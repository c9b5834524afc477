"""The quantization schemes of an engine's weights, read from its configuration before any weight is loaded.

A scheme says how one kind of layer stores its weights and rounds its activations. A checkpoint has one or several, and
layers that it leaves unquantized. `of` reads the formats that it knows in full. Anything else becomes a scheme of the
method's name alone with a remark in `other`, which no row of the feature table serves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

TENSOR, CHANNEL = "tensor", "channel"
TOKEN = "token"
# vLLM's names of one method, by release and by kernel.
_METHODS = {
    "awq": "awq",
    "awq_marlin": "awq",
    "auto_awq": "awq",
    "gptq": "gptq",
    "gptq_marlin": "gptq",
    "auto_gptq": "gptq",
    "fp8": "fp8",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "mxfp4",
    "gpt_oss_mxfp4": "mxfp4",
    "auto-round": "inc",
    "modelopt_fp4": "modelopt",
    "modelopt_mixed": "modelopt",
}

# vLLM's method that takes checkpoints of AWQ and GPTQ, where a user names it: experts have a layout of its own.
WNA16, _WNA16_OF = "moe_wna16", ("awq", "gptq")


@dataclass(frozen=True)
class Scheme:
    """How one kind of layer is quantized.

    method: vLLM's name of the method, without the kernel's: "compressed-tensors", "awq", "gptq", "fp8", ...
    weight: "int4", "int8", "fp8", "nvfp4" (e2m1 with scales in e4m3), ... or "" if unknown. scale: what shares a scale
    of the weight: "tensor", "channel" (a row of [N, K]), a number of elements of K ("128"), or rows x columns of a
    block ("128x128").
    zeros: zero points. order: act-order, which gives each element of K a group of its own choice.
    activation: "" for 16-bit activations, else their type. activation_scale: what shares an activation's scale:
    "token", a number of elements ("128"), or "tensor". static: the checkpoint has the activations' scale, of "nvfp4"
    the one scale of all. Without it, the scale of a "tensor" depends on the batch.
    head: the language-model head is quantized, too. online: vLLM quantizes 16-bit weights while it loads them.
    powers: scales of blocks are powers of two (scale_fmt ue8m0).
    other: what `of` does not know, in words. No scheme with a remark is served.
    """

    method: str
    weight: str = ""
    scale: str = ""
    zeros: bool = False
    order: bool = False
    activation: str = ""
    activation_scale: str = ""
    static: bool = False
    head: bool = False
    online: bool = False
    powers: bool = False
    other: str = ""

    def __str__(self) -> str:
        """One line for errors, e.g. "gptq int4, groups of 128, act-order"."""
        scale = f"groups of {self.scale}" if self.scale.isdigit() else f"scales per {self.scale}" if self.scale else ""
        rows = f"{self.activation} activations per {self.activation_scale}{', static' if self.static else ''}"
        said = (
            scale,
            "zero points" if self.zeros else "",
            "act-order" if self.order else "",
            rows if self.activation else "",
            "a quantized head" if self.head else "",
            "quantized while loading" if self.online else "",
            "scales of powers of two" if self.powers else "",
            self.other,
        )
        return ", ".join(filter(None, (f"{self.method} {self.weight}".strip(), *said)))


def of(config: Any) -> tuple[Scheme, ...]:
    """The schemes of a finished engine configuration, without duplicates. () for unquantized weights, and for the
    configuration of a language model inside of another model, whose own configuration has the schemes.

    config: a vllm.config.VllmConfig.
    """
    model = config.model_config
    named = None if model is None else getattr(model, "quantization", None)
    if named is None or getattr(model, "is_submodel_config", False):
        return ()
    held, method = _checkpoint(model), _METHODS.get(named, named)
    asked = getattr(model, "quantization_config", None)
    if asked is not None:
        made = _ONLINE.get(named) if held is None and _is_short(named, asked) else None
        return (made or Scheme(method, online=True, other="a quantization_config of the engine's arguments"),)
    if held is None:
        return (_ONLINE["fp8"] if method == "fp8" else Scheme(method, other="its config.json does not describe it"),)
    said = str(held.get("quant_method", "")).lower().replace("compressed_tensors", "compressed-tensors")
    heads = _heads(model)
    if method == WNA16 and said in _WNA16_OF:
        return _uniform(_read(said, held, heads))
    if _METHODS.get(said, said) != method or method not in _READERS:
        return (Scheme(method, other=f"a checkpoint of method {said!r}"),)
    return _read(method, held, heads)


def _heads(model: Any) -> tuple[str, ...]:
    """The names that vLLM may give the language-model head. A language model inside of another model has a prefix."""
    whole = getattr(model, "hf_config", None)
    inside = getattr(model, "hf_text_config", whole) is not whole
    return ("lm_head", "language_model.lm_head") if inside else ("lm_head",)


def _read(method: str, held: Mapping[str, Any], heads: tuple[str, ...]) -> tuple[Scheme, ...]:
    try:
        return tuple(dict.fromkeys(_READERS[method](held, heads)))
    except (TypeError, ValueError, KeyError, AttributeError, re.error) as error:
        return (Scheme(method, other=f"a configuration that cannot be read ({type(error).__name__}: {error})"),)


def _uniform(found: tuple[Scheme, ...]) -> tuple[Scheme, ...]:
    """A checkpoint's schemes for moe_wna16, which loads no quantized head, and keeps rules by layer for linears."""
    odd = "a quantized head" if any(scheme.head for scheme in found) else "rules by layer" if len(found) > 1 else ""
    return tuple(replace(scheme, other=scheme.other or (odd and f"{odd} with {WNA16}")) for scheme in found)


# What vLLM makes of 16-bit weights, by the name in --quantization.
_ONLINE = {
    "fp8": Scheme("fp8", "fp8", TENSOR, activation="fp8", activation_scale=TENSOR, online=True),
    "fp8_per_channel": Scheme("fp8", "fp8", CHANNEL, activation="fp8", activation_scale=TOKEN, online=True),
    "fp8_per_block": Scheme("fp8", "fp8", "128x128", activation="fp8", activation_scale="128", online=True),
}


def _is_short(named: str, asked: Any) -> bool:
    """Whether the quantization_config of an engine's arguments is what vLLM makes of the name alone.

    asked: a vllm.config.quantization.QuantizationConfigArgs, whose layers' weights a name of vLLM describes.
    """
    layers = [getattr(asked, kind, None) for kind in ("linear", "moe")]
    plain = all(layer is not None and getattr(layer, "activation", "") is None for layer in layers)
    others = any(getattr(asked, name, None) for name in ("ignore", "targets"))
    return plain and not others and {str(layer) for layer in layers} == {f"{named}_static"}


def _checkpoint(model: Any) -> Mapping[str, Any] | None:
    """The checkpoint's quantization_config, found where vLLM finds it."""
    held = getattr(model, "hf_config", None)
    for owner, name in (
        (held, "quantization_config"),
        (getattr(held, "text_config", None), "quantization_config"),
        (held, "compression_config"),
    ):
        found = getattr(owner, name, None)
        if found is not None:
            return found if isinstance(found, Mapping) else found.to_dict()
    return None


def _unknown(held: Mapping[str, Any], known: str) -> str:
    """The entries that have a value and that `known` does not list, in words."""
    names = sorted(
        name for name, value in held.items() if value not in (None, {}, [], False, "") and name not in known.split()
    )
    return f"with {', '.join(names)}" if names else ""


def _group(size: int) -> str:
    return CHANNEL if int(size) == -1 else str(int(size))


# What a quantizer notes about its own work. None of it changes what a kernel computes.
_NOTES = "quant_method version quantizer meta backend damp_percent true_sequential static_groups format "
_AWQ = _NOTES + "bits w_bit group_size q_group_size zero_point modules_to_not_convert lm_head do_fuse fuse_max_seq_len"


def _awq(held: Mapping[str, Any], _: tuple[str, ...]) -> Iterator[Scheme]:
    bits, group = held.get("bits", held.get("w_bit")), held.get("group_size", held.get("q_group_size"))
    packing = str(held.get("version", "gemm")).lower()
    other = _unknown(held, _AWQ) or ("" if packing == "gemm" else f"packing {packing!r}")
    yield Scheme(
        "awq",
        f"int{int(bits)}",
        _group(group),
        zeros=bool(held["zero_point"]),
        head=bool(held.get("lm_head", False)),
        other=other,
    )


_GPTQ = _NOTES + (
    "bits group_size desc_act sym lm_head dynamic modules_in_block_to_quantize checkpoint_format model_name_or_path "
    "model_file_base_name tokenizer dataset batch_size model_seqlen block_name_to_quantize use_cuda_fp16 "
    "module_name_preceding_first_block pad_token_id max_input_length use_exllama exllama_config act_group_aware "
    "pack_dtype cache_block_outputs"
)
_OVERRIDES = {"bits", "group_size", "desc_act", "sym"}


def _gptq(held: Mapping[str, Any], _: tuple[str, ...]) -> Iterator[Scheme]:
    packing = str(held.get("checkpoint_format") or "gptq")
    other = _unknown(held, _GPTQ) or ("" if packing in ("gptq", "gptq_v2") else f"packing {packing!r}")
    rules = [rule for name, rule in (held.get("dynamic") or {}).items() if not name.startswith("-:")]
    for rule in ({}, *rules):
        said = {**held, **rule}
        strange = ", ".join(sorted(set(rule) - _OVERRIDES))
        yield Scheme(
            "gptq",
            f"int{int(said['bits'])}",
            _group(said["group_size"]),
            zeros=not said["sym"],
            order=bool(said["desc_act"]) and int(said["group_size"]) != -1,  # one group has one order
            head=bool(held.get("lm_head", False)),
            other=other or (f"layers with {strange}" if strange else ""),
        )


_FP8 = (
    _NOTES
    + "activation_scheme weight_block_size ignored_layers modules_to_not_convert is_checkpoint_fp8_serialized fmt "
    + "scale_fmt"
)
_POWERS = "ue8m0"


def _fp8(held: Mapping[str, Any], _: tuple[str, ...]) -> Iterator[Scheme]:
    block, kind = held.get("weight_block_size"), held.get("activation_scheme", "dynamic")
    # MiniMax-M2 names PyTorch's type.
    known = held.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn")
    other = _unknown(held, _FP8) or ("" if known else f"format {held['fmt']!r}")
    if held.get("scale_fmt") not in (None, _POWERS) or held.get("scale_fmt") and not block:
        other = other or f"scales of format {held['scale_fmt']!r}"
    yield Scheme(
        "fp8",
        "fp8",
        "x".join(str(int(size)) for size in block) if block else TENSOR,
        activation="fp8",
        activation_scale=str(int(block[1])) if block else TENSOR,
        static=kind == "static",
        powers=bool(block) and held.get("scale_fmt") == _POWERS,
        other=other or ("" if kind in ("static", "dynamic") else f"activations {kind!r}"),
    )


_TENSORS = (
    "quant_method format config_groups ignore quantization_status global_compression_ratio version "
    "total_num_heads total_num_kv_heads"
)
_GROUP = "weights input_activations targets format"
_NVFP4 = "nvfp4-pack-quantized"
_PACKINGS = ("int-quantized", "float-quantized", "pack-quantized", "naive-quantized", "mixed-precision", "None")
_NOTED = {"observer", "observer_kwargs", "zp_dtype"}


def _compressed(held: Mapping[str, Any], heads: tuple[str, ...]) -> Iterator[Scheme]:
    other = _unknown({name: value for name, value in held.items() if name != _CACHE}, _TENSORS)
    if held.get(_CACHE) and not _eighth_cache(held[_CACHE]):
        other = other or "with another KV cache than FP8 with static scales, one for a layer or for each key head"
    for group in held["config_groups"].values():
        packing = str(group.get("format", held.get("format")))
        weight = _args(group["weights"])
        known = packing == _NVFP4 if weight.kind == "nvfp4" else packing in _PACKINGS
        odd = other or _unknown(group, _GROUP) or ("" if known else f"packing {packing!r}")
        targets = set(group["targets"])
        strange = sorted(
            target for target in targets if "." not in target and target not in ("Linear", "lm_head", "re:.*lm_head")
        )
        made = Scheme(
            "compressed-tensors",
            weight.kind,
            weight.scale,
            zeros=not weight.symmetric,
            order=weight.order,
            head=any(_targets(targets, head) and not _named(held.get("ignore") or (), head) for head in heads),
            other=odd or weight.other or (f"targets {', '.join(strange)}" if strange else ""),
        )
        if weight.dynamic:
            made = replace(made, other=made.other or "weights with dynamic scales")
        if group.get("input_activations"):
            rows = _args(group["input_activations"])
            made = replace(
                made,
                activation=rows.kind if rows.symmetric else f"asymmetric {rows.kind}",
                activation_scale=rows.scale,
                static=rows.local if rows.kind == "nvfp4" else not rows.dynamic,
                other=made.other or rows.other or ("act-order of activations" if rows.order else ""),
            )
        yield made


def _named(names: Iterable[str], head: str) -> bool:
    """Whether vLLM finds a head in such a list: a whole name, or an expression ("re:...") from the name's beginning."""
    return any(re.match(name[3:], head) if name.startswith("re:") else name == head for name in names)


def _targets(targets: Iterable[str], head: str) -> bool:
    """Whether a group of compressed-tensors may quantize a head. vLLM compares expressions with its class, too, and
    renames a head that has a prefix."""
    return _named(targets, head) or any(
        re.match(name[3:], "ParallelLMHead") if name.startswith("re:") else name.endswith(".lm_head")
        for name in targets
    )


_CACHE = "kv_cache_scheme"


def _eighth_cache(held: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's scheme of the KV cache is FP8 with static scales: for the keys of a layer one, and one for
    its values, or such a pair for each key head."""
    if held.get("strategy") == "attn_head":
        held = {**held, "strategy": "tensor"}  # the rest is what one scale has
    made = _args(held)
    kind = (made.kind, made.scale, made.symmetric, made.dynamic, made.order, made.other)
    return kind == ("fp8", TENSOR, True, False, False, "")


def caches(config: Any) -> bool:
    """Whether the checkpoint of a finished engine configuration asks for a quantized KV cache."""
    model = config.model_config
    held = (None if model is None else _checkpoint(model)) or {}
    return any(part.get(name) for part in (held, _inner(held)) for name in (_CACHE, "kv_cache_quant_algo"))


def _inner(held: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of ModelOpt's older files that describes the quantization, or the whole."""
    return held.get("quantization", held)


@dataclass(frozen=True)
class _Args:
    """The QuantizationArgs of compressed-tensors."""

    kind: str
    scale: str
    symmetric: bool
    dynamic: bool
    local: bool  # NVFP4: a scale of all from the checkpoint, and one of each group from the row
    order: bool
    other: str


def _args(held: Mapping[str, Any]) -> _Args:
    strategy, group = held.get("strategy"), held.get("group_size")
    strategy = strategy or ("group" if group and group > 0 else CHANNEL if group == -1 else TENSOR)
    scales = {"tensor": TENSOR, "channel": CHANNEL, "token": TOKEN}
    scales |= {"group": str(group), "block": "x".join(map(str, held.get("block_structure") or ()))}
    known = {
        "num_bits",
        "type",
        "strategy",
        "group_size",
        "symmetric",
        "dynamic",
        "actorder",
        "block_structure",
        *_NOTED,
    }
    kind = {"int": "int", "float": "fp"}[str(held.get("type", "int"))] + str(int(held.get("num_bits", 8)))
    if (strategy, kind, group) == ("tensor_group", "fp4", 16):
        kind, scales[strategy] = "nvfp4", "16"
        known |= {"scale_dtype"} if "float8_e4m3fn" in str(held.get("scale_dtype")) else set()
    odd = sorted(name for name, value in held.items() if value is not None and name not in known)
    local = kind == "nvfp4" and held.get("dynamic") == "local"
    if held.get("dynamic") not in (None, True, False) and not local:
        odd.append(f"dynamic {held['dynamic']!r}")
    # "weight" and "static" order the groups before packing, and keep them in order in memory.
    order = str(held.get("actorder") or "none").lower() in ("group", "true", "dynamic")
    return _Args(
        kind,
        scales.get(strategy, ""),
        bool(held.get("symmetric", True)),
        bool(held.get("dynamic", False)),
        local,
        order,
        f"with {', '.join(odd)}" if odd else "" if scales.get(strategy) else f"scales of strategy {strategy!r}",
    )


def _mxfp4(held: Mapping[str, Any], _: tuple[str, ...]) -> Iterator[Scheme]:
    yield Scheme("mxfp4", "mxfp4", "32", other=_unknown(held, _NOTES + "modules_to_not_convert"))


_ROUND = _NOTES + (
    "bits group_size sym data_type packing_format backend vllm_backend extra_config block_name_to_quantize dataset "
    "to_quant_block_names autoround_version amp batch_size enable_minmax_tuning enable_norm_bias_tuning lr minmax_lr "
    "enable_quanted_input gradient_accumulate_steps iters low_gpu_mem_usage nsamples scale_dtype seqlen train_bs "
    "not_use_best_mse dynamic_max_gap act_bits act_sym act_dynamic act_data_type act_group_size"
)
_ROUND_PACKINGS = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}


def _auto_round(held: Mapping[str, Any], heads: tuple[str, ...]) -> Iterator[Scheme]:
    """AutoRound's integers in the packing of GPTQ without zero points, or of AWQ with them."""
    packing = str(held.get("packing_format") or "auto_round:auto_gptq")
    backend = str(held.get("backend") or held.get("vllm_backend") or "auto")
    other = _unknown(held, _ROUND) or ("" if packing in _ROUND_PACKINGS else f"packing {packing!r}")
    other = other or ("" if backend == "auto" else f"backend {backend!r}")
    other = other or ("" if held.get("data_type", "int") == "int" else f"data type {held['data_type']!r}")
    other = other or ("" if int(held.get("act_bits") or 16) >= 16 else "quantized activations")
    layers = dict(held.get("extra_config") or {})
    blocks = next((held[name] for name in ("block_name_to_quantize", "to_quant_block_names") if name in held), None)
    blocks = blocks.split(",") if isinstance(blocks, str) else blocks or ()
    in_blocks = any(head.startswith(block) for head in heads for block in blocks)
    for name, rule in {"": {}, **layers}.items():
        said = {**held, **rule}
        if int(said["bits"]) >= 16:
            continue
        zeros = not said.get("sym", True)
        strange = zeros != (_ROUND_PACKINGS.get(packing) == "awq")
        yield Scheme(
            "inc",
            f"int{int(said['bits'])}",
            _group(said["group_size"]),
            zeros=zeros,
            head=any(_by_rule(name, head) for head in heads) if name else in_blocks,
            other=other or (f"packing {packing!r} {'with' if zeros else 'without'} zero points" if strange else ""),
        )


def _by_rule(name: str, head: str) -> bool:
    """Whether a rule of AutoRound may be a head's: its whole name, the end of a longer name, or an expression."""
    return name.endswith("lm_head") or re.search(name, head) is not None


_MODELOPT = (
    "quant_method quant_algo producer ignore exclude_modules config_groups kv_cache_scheme kv_cache_quant_algo "
    "group_size quantized_layers quantization has_zero_point pre_quant_scale version"
)
_ALGORITHMS = {
    "FP8": Scheme("modelopt", "fp8", TENSOR, activation="fp8", activation_scale=TENSOR, static=True),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme("modelopt", "fp8", CHANNEL, activation="fp8", activation_scale=TOKEN),
    "FP8_PB_WO": Scheme("modelopt", "fp8", "128x128", activation="fp8", activation_scale="128"),
    "W4A16_NVFP4": Scheme("modelopt", "nvfp4", "16"),
    "NVFP4": Scheme("modelopt", "nvfp4", "16", activation="nvfp4", activation_scale="16", static=True),
}


def _modelopt(held: Mapping[str, Any], heads: tuple[str, ...]) -> Iterator[Scheme]:
    """NVIDIA's Model Optimizer names an algorithm for all layers, or one for each layer (MIXED_PRECISION)."""
    said = _inner(held)
    whole = str(said["quant_algo"]).upper()
    layers = said.get("quantized_layers") or {} if whole == "MIXED_PRECISION" else {"": said}
    other = _unknown({**said, **held}, _MODELOPT) or ("" if layers else "no quantized layers")
    if said.get("has_zero_point") or said.get("pre_quant_scale"):
        other = other or "zero points or smoothed activations"
    if not _modelopt_cache(said, held):
        other = other or "with another KV cache than FP8 with one static scale for a layer"
    groups = list((held.get("config_groups") or {}).values())
    yield from () if layers else (Scheme("modelopt", other=other),)
    # vLLM reads one list: that of the older files, or the first name of two.
    left_out = said.get("exclude_modules") if said is not held else held.get("ignore", held.get("exclude_modules"))
    open_heads = [head for head in heads if not _excluded(left_out or (), head)]
    for name, layer in layers.items():
        algorithm = str(layer["quant_algo"]).upper()
        if algorithm == whole == "NVFP4" and groups and not any(group.get("input_activations") for group in groups):
            algorithm = "W4A16_NVFP4"  # as vLLM reads such a file
        made = _ALGORITHMS.get(algorithm, Scheme("modelopt", other=f"algorithm {algorithm}"))
        sizes = (layer, said, *(group.get("weights") or {} for group in groups))
        if made.weight == "nvfp4" and any(int(part.get("group_size") or 16) != 16 for part in sizes):
            made = replace(made, other="groups of another size than 16")
        # One algorithm for all layers is the head's, too.
        takes = not name or name.endswith("lm_head") or any(name.startswith(f"{head}.") for head in heads)
        yield replace(made, head=takes and bool(open_heads), other=made.other or other)


def _excluded(left_out: Iterable[str], head: str) -> bool:
    """Whether ModelOpt's list leaves a head unquantized: by a part of the head's name, or by a wildcard."""
    return any(name in head or fnmatchcase(head, name) for name in left_out)


def _modelopt_cache(said: Mapping[str, Any], held: Mapping[str, Any]) -> bool:
    """Whether ModelOpt's file asks for no quantized KV cache, or for FP8 with static scales."""
    asked = [part.get(name) for name in (_CACHE, "kv_cache_quant_algo") for part in (said, held)]
    return all(
        _eighth_cache(each) if isinstance(each, Mapping) else str(each).upper() == "FP8" for each in asked if each
    )


_QUARK = (
    "quant_method algo_config exclude export global_quant_config kv_cache_post_rope kv_cache_quant_config "
    "layer_quant_config layer_type_quant_config quant_mode softmax_quant_spec version"
)
_QUARK_TENSOR = (
    "dtype qscheme is_dynamic symmetric ch_axis group_size block_size observer_cls round_method scale_type "
    "scale_format scale_calculation_mode mx_element_dtype qat_spec is_scale_quant zero_point_type"
)


def _quark(held: Mapping[str, Any], _: tuple[str, ...]) -> Iterator[Scheme]:
    """AMD Quark in FP8: static activations, or scales per channel with activations per token. And in NVFP4."""
    other = _unknown(held, _QUARK) or ("rules by the type of a layer" if held.get("layer_type_quant_config") else "")
    for group in (held["global_quant_config"], *(held.get("layer_quant_config") or {}).values()):
        weight, rows = group["weight"], group.get("input_tensors") or {}
        if isinstance(weight, list):
            yield _quark_four(weight, rows, other)
            continue
        odd = _unknown(weight, _QUARK_TENSOR) or _unknown(rows, _QUARK_TENSOR)
        scales = {"per_tensor": TENSOR, "per_channel": CHANNEL}
        kinds = (weight.get("dtype"), rows.get("dtype"), bool(weight.get("is_dynamic")))
        form = (weight.get("qscheme"), rows.get("qscheme"), bool(rows.get("is_dynamic")))
        known = kinds == ("fp8_e4m3", "fp8_e4m3", False) and form[0] in scales
        known = known and (form[1:] == ("per_tensor", False) or form == ("per_channel", "per_channel", True))
        static = not form[2]
        yield Scheme(
            "quark",
            "fp8" if known else "",
            scales.get(form[0], ""),
            activation="fp8" if known else "",
            activation_scale=TENSOR if static else TOKEN,
            static=static,
            other=other or odd or ("" if known else f"weights {kinds[0]}, activations {kinds[1]}, {form}"),
        )


# What matters of each of Quark's two specifications: of groups, and of all.
_QUARK_FOUR = (("fp4", "per_group", 16), ("fp8_e4m3", "per_tensor", None))


def _quark_four(weight: list, rows: Any, other: str) -> Scheme:
    """NVFP4 of weights and activations. Of activations, a group's scale comes from the row."""
    both = [*weight, *(rows if isinstance(rows, list) else ())]
    form = [(part.get("dtype"), part.get("qscheme"), part.get("group_size") or None) for part in both]
    dynamic = [bool(part.get("is_dynamic")) for part in both]
    odd = next(filter(None, (_unknown(part, _QUARK_TENSOR) for part in both)), "")
    if form != [*_QUARK_FOUR, *_QUARK_FOUR] or dynamic != [False, False, True, False]:
        return Scheme("quark", other=other or odd or f"several specifications of one tensor: {form}")
    return Scheme("quark", "nvfp4", "16", activation="nvfp4", activation_scale="16", static=True, other=other or odd)


_READERS = {
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "mxfp4": _mxfp4,
    "inc": _auto_round,
    "modelopt": _modelopt,
    "quark": _quark,
}
