"""A scale of a checkpoint that gives no numbers is refused by the name of its tensor, in every scheme."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import scales
from bi_patch.seams.common import quantized as seams

NAN, INF = float("nan"), float("inf")
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu

# By the scheme: the names and types of what a layer of vLLM loads.
SCALES = {
    "INT8, FP8 per channel": {"weight_scale": torch.float32},
    "FP8 in blocks": {"weight_scale_inv": torch.float32},
    "FP8 in blocks, powers of two": {"weight_scale_inv": E8M0},
    "W4A16, W8A16": {"weight_scale": torch.bfloat16},
    "AWQ, GPTQ": {"scales": torch.float16},
    "NVFP4 of compressed-tensors": {"weight_scale": E4M3, "weight_global_scale": torch.float32},
    "NVFP4 of ModelOpt and Quark": {"weight_scale": E4M3, "weight_scale_2": torch.float32},
    "experts of AWQ and GPTQ": {"w13_scales": torch.bfloat16, "w2_scales": torch.bfloat16},
    "experts in FP8": {"w13_weight_scale": torch.float32, "w2_weight_scale": torch.float32},
    "experts in FP8 blocks": {"w13_weight_scale_inv": torch.float32, "w2_weight_scale_inv": torch.float32},
    "experts in NVFP4": {"w13_weight_scale": E4M3, "w2_weight_scale_2": torch.float32},
    "experts in MXFP4": {"w13_weight_scale": torch.uint8, "w2_weight_scale": torch.uint8},
}
_NANS = {torch.uint8: 0xFF, E8M0: 0xFF, E4M3: 0x7F}
CASES = [(scheme, key) for scheme, held in SCALES.items() for key in held]


class Method:
    """Stands for a method of vLLM with quantized weights."""


class UnquantizedLinearMethod:
    pass


def model(method=Method, **held):
    """A model with one layer, model.down, that holds tensors."""
    made, layer = torch.nn.Module(), torch.nn.Module()
    made.add_module("down", layer)
    layer.quant_method = method()
    for name, value in held.items():
        layer.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    return made


def tensors(scheme, **changed):
    """A layer's tensors. changed: the value of the last element of some of them."""
    made = {}
    for key, dtype in SCALES[scheme].items():
        value = torch.ones(3, 4).to(dtype)
        if key in changed:
            if changed[key] != changed[key] and dtype in _NANS:
                value.view(torch.uint8)[2, 3] = _NANS[dtype]
            else:
                value[2, 3] = changed[key]
        made[key] = value
    return made


@pytest.mark.parametrize("scheme", SCALES)
def test_numbers_are_taken(scheme):
    scales.check(model(**tensors(scheme)))


@pytest.mark.parametrize(("scheme", "key"), CASES)
def test_a_nan_is_refused_with_the_name_of_its_tensor(scheme, key):
    words = rf"quantized.scales: down.{key} holds a NaN at \[2, 3\] of \[3, 4\]. .*BI_PATCH=0"
    with pytest.raises(UnsupportedFeature, match=words):
        scales.check(model(**tensors(scheme, **{key: NAN})))


@pytest.mark.parametrize(("scheme", "key"), [(s, k) for s, k in CASES if SCALES[s][k] not in (torch.uint8, E8M0, E4M3)])
@pytest.mark.parametrize("value", [INF, -INF])
def test_an_infinity_is_refused_with_the_name_of_its_tensor(scheme, key, value):
    with pytest.raises(UnsupportedFeature, match=rf"quantized.scales: down.{key} holds an infinity at \[2, 3\]"):
        scales.check(model(**tensors(scheme, **{key: value})))


@pytest.mark.parametrize(("scheme", "key"), [(s, k) for s, k in CASES if SCALES[s][k] not in (torch.uint8, E8M0)])
@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_weights_may_be_scaled_by_zero_and_by_numbers_below(scheme, key, value):
    if key == "weight_global_scale" and not value:
        with pytest.raises(UnsupportedFeature, match="down.weight_global_scale holds a zero"):
            scales.check(model(**tensors(scheme, **{key: value})))
        return
    scales.check(model(**tensors(scheme, **{key: value})))


def test_all_parts_of_a_large_tensor_are_looked_at(monkeypatch):
    monkeypatch.setattr(scales, "_AT_ONCE", 5)
    with pytest.raises(UnsupportedFeature, match=r"holds a NaN at \[2, 3\] of \[3, 4\]"):
        scales.check(model(**tensors("AWQ, GPTQ", scales=NAN)))


def test_one_scale_alone_has_no_place():
    with pytest.raises(UnsupportedFeature, match="down.weight_scale holds a NaN. Load"):
        scales.check(model(weight_scale=torch.tensor(NAN)))


@pytest.mark.parametrize("key", ["input_scale", "w13_input_scale"])
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0.5, 0.25), ""),
        ((0.5, torch.finfo(torch.float32).min), ""),  # a layer made of two, and one scale for both in the checkpoint
        ((torch.finfo(torch.float32).min,) * 2, "is not above zero, or the checkpoint lacks it"),
        ((0.0, 0.0), "is not above zero"),
        ((0.5, NAN), "holds a NaN"),
        ((INF, 0.5), "holds an infinity"),
    ],
)
def test_a_static_scale_of_activations_must_be_above_zero(key, values, words):
    held = model(weight_scale=torch.ones(2), **{key: torch.tensor(values)})
    if not words:
        return scales.check(held)
    with pytest.raises(UnsupportedFeature, match=f"quantized.scales: down.{key} {words}"):
        scales.check(held)


@pytest.mark.parametrize("part", ["", "w13_"])
def test_a_scale_of_activations_that_no_kernel_reads_does_not_count(part):
    whole = {f"{part}weight_scale_2": torch.ones(1)}
    scales.check(model(**whole, **{f"{part}input_scale": torch.tensor([NAN])}))
    with pytest.raises(UnsupportedFeature, match="down.w2_input_scale holds a NaN"):  # of the other products
        scales.check(model(**whole, w2_input_scale=torch.tensor([NAN])))


def test_a_scale_without_memory_or_without_numbers_does_not_count():
    scales.check(model(weight_scale=torch.empty(3, 4, device="meta"), scales=torch.empty(0, 4)))


def test_layers_without_quantized_weights_do_not_count():
    scales.check(model(UnquantizedLinearMethod, weight_scale=torch.tensor(NAN)))
    scales.check(model(lambda: None, weight_scale=torch.tensor(NAN)))


def attention(kind="fp8", **held):
    made = model(**{key: torch.tensor(value) for key, value in held.items()})
    made.down.kv_cache_dtype = kind
    return made


@pytest.mark.parametrize(
    ("keys", "values", "wrong"),
    [
        (0.5, 0.25, ""),
        (-1.0, -1.0, ""),  # the checkpoint has none: 1.0
        (0.5, -1.0, ""),  # the checkpoint has one for both
        ([0.5, 0.25], [1.0, 2.0], ""),
        (-1.0, 0.5, "k_scale is not above zero"),
        (NAN, 0.5, "k_scale holds a NaN"),
        (0.5, NAN, "v_scale holds a NaN"),
        (0.5, INF, "v_scale holds an infinity"),
        (0.0, 0.5, "k_scale is not above zero"),
        (0.5, 0.0, "v_scale is not above zero"),
        (-2.0, -2.0, "k_scale is not above zero"),
        ([0.5, 0.0], [1.0, 1.0], "k_scale is not above zero"),
        ([0.5, 0.5], [1.0, NAN], r"v_scale holds a NaN at \[1\] of \[2\]"),
    ],
)
@pytest.mark.parametrize("taken", [False, True])
def test_scales_of_an_fp8_kv_cache_are_above_zero(keys, values, wrong, taken):
    """taken: vLLM took the checkpoint's scales already, as after new weights."""
    held = attention(**{f"{'_' * taken}k_scale": keys, f"{'_' * taken}v_scale": values})
    check = scales.check_caches if taken else scales.check
    if not wrong:
        return check(held)
    with pytest.raises(UnsupportedFeature, match=f"quantized.scales: down.{wrong}.*--kv-cache-dtype auto"):
        check(held)


def test_scales_of_a_cache_in_16_bits_do_not_count():
    scales.check(attention("auto", k_scale=NAN, v_scale=NAN))
    scales.check_caches(attention("bfloat16", _k_scale=NAN, _v_scale=NAN))


def test_the_model_is_checked_before_a_layer_is_packed():
    packed = []
    closed = seams._checked(lambda model, *rest: packed.append(rest))
    closed(model(**tensors("AWQ, GPTQ")), "config", "device")
    assert packed == [("config", "device")]
    with pytest.raises(UnsupportedFeature, match="down.scales"):
        closed(model(**tensors("AWQ, GPTQ", scales=NAN)), "config", "device")
    assert len(packed) == 1


@pytest.mark.parametrize(("kind", "checked"), [("auto", True), ("safetensors", True), ("dummy", False)])
def test_dummy_weights_are_no_checkpoint(monkeypatch, kind, checked):
    vllm = pytest.importorskip("vllm.config")
    config = SimpleNamespace(load_config=SimpleNamespace(load_format=kind))
    monkeypatch.setattr(vllm, "get_current_vllm_config_or_none", lambda: config)
    closed, held = seams._checked(lambda model: "packed"), model(**tensors("AWQ, GPTQ", scales=NAN))
    if not checked:
        assert closed(held) == "packed"
        return
    with pytest.raises(UnsupportedFeature, match="down.scales"):
        closed(held)


def test_new_weights_of_a_layer_on_cpu_are_checked(monkeypatch):
    from bi_patch.ops.cpu import quantized as routes
    from bi_patch.seams.cpu import quantized

    layer = model(**tensors("AWQ, GPTQ", scales=NAN)).down
    layer.prefix = "model.layers.0.mlp.down_proj"
    monkeypatch.setattr(routes, "scheme", lambda layer: "W4A16 groups of 128")
    monkeypatch.setattr(routes, "has_route", lambda layer: False)
    quantized._first(layer)  # the first weights, which the patch point on the model has seen
    monkeypatch.setattr(routes, "has_route", lambda layer: True)
    with pytest.raises(UnsupportedFeature, match=r"quantized.scales: model.layers.0.mlp.down_proj.scales holds a NaN"):
        quantized._first(layer)


def test_new_scales_of_a_cache_on_cuda_are_checked(monkeypatch):
    from bi_patch.seams.cuda import linear, scaled_linear

    kept = []
    monkeypatch.setattr(scaled_linear, "keep_products", kept.append)
    held = attention(_k_scale=0.5, _v_scale=0.25)
    linear._settle(held)
    assert kept == [held]
    with pytest.raises(UnsupportedFeature, match="quantized.scales: down.v_scale holds a NaN"):
        linear._settle(attention(_k_scale=0.5, _v_scale=NAN))
    assert kept == [held]


# Scales of activations that bi_patch's kernels do not read, because activations stay in 16 bits.
_UNREAD = {"input_global_scale", "input_scale_2", "act_global_scale"}


def test_every_scale_that_vllm_loads_is_known():
    """A scale with a name of its own, in a release to come, would not be checked."""
    vllm = pytest.importorskip("vllm")
    root = Path(vllm.__file__).parent / "model_executor/layers/quantization"
    pattern = re.compile(r'register_parameter\(\s*f?"([a-z0-9_]*scales?[a-z0-9_]*)"')
    found = {name for file in root.rglob("*.py") for name in pattern.findall(file.read_text())}
    assert {"weight_scale", "scales", "input_scale", "w13_weight_scale"} <= found
    assert {scales._stem(name) for name in found} <= scales._OF_WEIGHTS | {scales._OF_ROWS} | _UNREAD
