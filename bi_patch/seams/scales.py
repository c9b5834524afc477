"""Scales of a checkpoint with quantized weights: a scale that gives no numbers is refused by the name of its tensor.

A NaN or an infinity among them makes weights, and with them whole answers, that are no numbers. Kernels and
certificates would meet it later, and could not name the tensor. Zero points are integers of the weight's bits: each of
them is valid. A negative scale of weights is valid, too: some tools make such scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bi_patch.errors import UnsupportedFeature

_EXPERTS = ("w13_", "w2_")
_OF_WEIGHTS = frozenset(("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "scales"))
_DIVIDES = "weight_global_scale"  # in compressed-tensors' NVFP4: vLLM takes its reciprocal
_OF_ROWS = "input_scale"  # static activations
_LEAVES_ROWS = "weight_scale_2"  # a layer in NVFP4, whose activations stay in 16 bits: their scale is not used
_ABSENT = -1.0  # vLLM's value of a KV cache's scale that no checkpoint gave
_NAN_E8M0 = 255
_AT_ONCE = 1 << 26  # scales that are widened at once


def check(model: Any) -> None:
    """Raise UnsupportedFeature for the first scale of a loaded model that gives no numbers.

    model: a torch.nn.Module whose parameters are the checkpoint's, before vLLM or bi_patch packs them.
    """
    for name, layer in model.named_modules():
        check_layer(layer, name)


def check_layer(layer: Any, name: str) -> None:
    """The same for one layer, which may have layers of its own. name: the layer's name in an error."""
    method = type(getattr(layer, "quant_method", None)).__name__
    if method == "NoneType" or method.startswith("Unquantized"):
        return
    held = {key: value.data for key, value in _scales(layer) if value is not None and not value.is_meta}
    for key, value in held.items():
        if words := _wrong(key, value, held):
            raise UnsupportedFeature(
                f"quantized.scales: {name or type(layer).__name__}.{key} {words}. Load the checkpoint again from its "
                "source, or quantize the model again. Or set BI_PATCH=0 to run vLLM without bi_patch"
            )
    _check_cache(layer, name)


def _scales(layer: Any) -> Iterator[tuple[str, Any]]:
    for key, value in layer.named_parameters(recurse=False):
        stem = _stem(key)
        if stem in _OF_WEIGHTS or stem == _OF_ROWS:
            yield key, value


def _stem(key: str) -> str:
    """A parameter's name without the part of the experts that it belongs to."""
    return next((key.removeprefix(part) for part in _EXPERTS if key.startswith(part)), key)


def _wrong(key: str, value: Any, held: dict[str, Any]) -> str:
    """What is wrong with a layer's scale `key`, in words, or "". held: all scales of the layer."""
    stem = _stem(key)
    if stem == _OF_ROWS and f"{key.removesuffix(stem)}{_LEAVES_ROWS}" in held:
        return ""
    if words := _not_finite(value):
        return words
    if stem == _DIVIDES and bool((value == 0).any()):
        return "holds a zero, by which weights would be divided"
    # A layer made of several holds one for each, and vLLM takes the greatest. Without a value in the checkpoint, vLLM
    # leaves a number below zero.
    if stem == _OF_ROWS and value.numel() and not bool(value.max() > 0):
        return "is not above zero, or the checkpoint lacks it: no row of activations can be divided by it"
    return ""


def _not_finite(value: Any) -> str:
    """Words for the first NaN or infinity of a tensor of scales, or "". Bytes are exponents, e8m0."""
    import torch

    flat, start = value.reshape(-1), 0
    for part in flat.split(_AT_ONCE):
        exponents = part.dtype == torch.uint8
        if not exponents and not part.is_floating_point():
            return ""
        bad = part == _NAN_E8M0 if exponents else ~torch.isfinite(part.float())
        if bool(bad.any()):
            at = int(bad.int().argmax())
            what = "a NaN" if exponents or bool(part[at].float().isnan()) else "an infinity"
            place = torch.unravel_index(torch.tensor(start + at), value.shape)
            where = f" at {[int(i) for i in place]} of {list(value.shape)}" if value.ndim else ""
            return f"holds {what}{where}"
        start += part.numel()
    return ""


def check_caches(model: Any) -> None:
    """Raise UnsupportedFeature for the first scale of an FP8 KV cache of a loaded model that is not above zero."""
    for name, layer in model.named_modules():
        _check_cache(layer, name)


def _check_cache(layer: Any, name: str) -> None:
    """The same for one layer: of the checkpoint's scales, or if vLLM took them already, of what vLLM made of them."""
    if not str(getattr(layer, "kv_cache_dtype", "")).startswith("fp8"):
        return
    held = [getattr(layer, key, getattr(layer, f"_{key}", None)) for key in ("k_scale", "v_scale")]
    if any(value is None for value in held):
        return
    keys, values = (value.data.float() for value in held)
    without = bool((keys == _ABSENT).all()), bool((values == _ABSENT).all())
    for key, value, absent in (("k_scale", keys, all(without)), ("v_scale", values, without[1])):
        words = _not_finite(value) or ("" if absent or bool((value > 0).all()) else "is not above zero")
        if words:
            raise UnsupportedFeature(
                f"quantized.scales: {name or type(layer).__name__}.{key} {words}, and scales an FP8 KV cache. Load the "
                "checkpoint again from its source, or use --kv-cache-dtype auto with a checkpoint without such scales. "
                "Or set BI_PATCH=0 to run vLLM without bi_patch"
            )
