"""The quantization schemes of an engine's weights, read from its configuration before any weight is loaded.

A scheme says how one kind of layer stores its weights and rounds its activations. A checkpoint has one or several, and
layers that it leaves unquantized. `of` reads the formats that it knows in full. Anything else becomes a scheme of the
method's name alone with a remark in `other`, which no row of the feature table serves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
}


@dataclass(frozen=True)
class Scheme:
    """How one kind of layer is quantized.

    method: vLLM's name of the method, without the kernel's: "compressed-tensors", "awq", "gptq", "fp8", ...
    weight: "int4", "int8", "fp8", "nvfp4" (e2m1 with scales in e4m3), ... or "" if unknown. scale: what shares a scale
    of the weight: "tensor", "channel" (a row of [N, K]), a number of elements of K ("128"), or rows x columns of a
    block ("128x128").
    zeros: zero points. order: act-order, which gives each element of K a group of its own choice.
    activation: "" for 16-bit activations, else their type. activation_scale: what shares an activation's scale:
    "token", a number of elements ("128"), or "tensor". static: the checkpoint has the activations' scale. Without it,
    the scale of a "tensor" depends on the batch.
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
    """The schemes of a finished engine configuration, without duplicates. () for unquantized weights.

    config: a vllm.config.VllmConfig.
    """
    model = config.model_config
    named = None if model is None else getattr(model, "quantization", None)
    if named is None:
        return ()
    held, method = _checkpoint(model), _METHODS.get(named, named)
    asked = getattr(model, "quantization_config", None)
    if asked is not None:
        made = _ONLINE.get(named) if held is None and _is_short(named, asked) else None
        return (made or Scheme(method, online=True, other="a quantization_config of the engine's arguments"),)
    if held is None:
        return (_ONLINE["fp8"] if method == "fp8" else Scheme(method, other="its config.json does not describe it"),)
    said = str(held.get("quant_method", "")).lower().replace("compressed_tensors", "compressed-tensors")
    if _METHODS.get(said, said) != method or method not in _READERS:
        return (Scheme(method, other=f"a checkpoint of method {said!r}"),)
    try:
        return tuple(dict.fromkeys(_READERS[method](held)))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        return (Scheme(method, other=f"a configuration that cannot be read ({type(error).__name__}: {error})"),)


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


def _awq(held: Mapping[str, Any]) -> Iterator[Scheme]:
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


def _gptq(held: Mapping[str, Any]) -> Iterator[Scheme]:
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


def _fp8(held: Mapping[str, Any]) -> Iterator[Scheme]:
    block, kind = held.get("weight_block_size"), held.get("activation_scheme", "dynamic")
    other = _unknown(held, _FP8) or ("" if held.get("fmt", "e4m3") == "e4m3" else f"format {held['fmt']!r}")
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


def _compressed(held: Mapping[str, Any]) -> Iterator[Scheme]:
    other = _unknown({name: value for name, value in held.items() if name != _CACHE}, _TENSORS)
    if held.get(_CACHE) and not _eighth_cache(held[_CACHE]):
        other = other or "with another KV cache than FP8 with one static scale"
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
            head=any("lm_head" in target for target in targets),
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
                static=not rows.dynamic,
                other=made.other or rows.other or ("act-order of activations" if rows.order else ""),
            )
        yield made


_CACHE = "kv_cache_scheme"


def _eighth_cache(held: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's scheme of the KV cache is FP8 with one static scale for the keys of a layer, and one for
    its values."""
    made = _args(held)
    kind = (made.kind, made.scale, made.symmetric, made.dynamic, made.order, made.other)
    return kind == ("fp8", TENSOR, True, False, False, "")


def caches(config: Any) -> bool:
    """Whether the checkpoint of a finished engine configuration asks for an FP8 KV cache."""
    model = config.model_config
    held = None if model is None else _checkpoint(model)
    return bool(held and held.get(_CACHE))


@dataclass(frozen=True)
class _Args:
    """The QuantizationArgs of compressed-tensors."""

    kind: str
    scale: str
    symmetric: bool
    dynamic: bool
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
    if held.get("dynamic") not in (None, True, False):
        odd.append(f"dynamic {held['dynamic']!r}")
    # "weight" and "static" order the groups before packing, and keep them in order in memory.
    order = str(held.get("actorder") or "none").lower() in ("group", "true", "dynamic")
    return _Args(
        kind,
        scales.get(strategy, ""),
        bool(held.get("symmetric", True)),
        bool(held.get("dynamic", False)),
        order,
        f"with {', '.join(odd)}" if odd else "" if scales.get(strategy) else f"scales of strategy {strategy!r}",
    )


def _mxfp4(held: Mapping[str, Any]) -> Iterator[Scheme]:
    yield Scheme("mxfp4", "mxfp4", "32", other=_unknown(held, _NOTES + "modules_to_not_convert"))


_READERS = {"awq": _awq, "gptq": _gptq, "fp8": _fp8, "compressed-tensors": _compressed, "mxfp4": _mxfp4}
