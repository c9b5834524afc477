"""Images beside another feature: what a run compared starts, and everything else is refused by name."""

from types import SimpleNamespace

import pytest
from feature_configs import check, config, images, ngram
from packaging.version import Version

from bi_patch.errors import UnsupportedFeature
from bi_patch.platforms.features import table

QWEN = images("Qwen3VLForConditionalGeneration", "qwen3_vl")
INTEGERS = {"num_bits": 8, "type": "int", "symmetric": True}
TOKEN = INTEGERS | {"strategy": "token", "dynamic": True}
FLOATS = {"num_bits": 8, "type": "float", "symmetric": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def tensors(weights, rows=None):
    group = {"weights": weights | {"dynamic": False}, "input_activations": rows, "targets": ["Linear"]}
    packing = "pack-quantized" if rows is None else f"{weights['type']}-quantized"
    return {"quant_method": "compressed-tensors", "format": packing, "config_groups": {"group_0": group}}


INT8 = tensors(INTEGERS | {"strategy": "channel"}, TOKEN)
FOUR = tensors(INTEGERS | {"num_bits": 4, "strategy": "group", "group_size": 128})
CHANNELS = tensors(FLOATS | {"strategy": "channel"}, FLOATS | {"strategy": "token", "dynamic": True})


def checkpoint(held, **changes):
    """Changes for Qwen3-VL with weights of a quantization_config."""
    vision = SimpleNamespace(model_type="qwen3_vl", num_heads=16)
    hf = SimpleNamespace(vision_config=vision, quantization_config=held)
    return QWEN | {"model_quantization": held["quant_method"], "model_hf_config": hf} | changes


def two(heads=16, architecture="Qwen3VLForConditionalGeneration", encoder="qwen3_vl", **changes):
    vision = SimpleNamespace(model_type=encoder, num_heads=heads)
    hf = {"model_hf_config": SimpleNamespace(vision_config=vision)}
    return images(architecture, encoder) | hf | {"parallel_tensor_parallel_size": 2} | changes


def refused(platform, said, **changes):
    with pytest.raises(UnsupportedFeature, match=f"features: .*{said}.*BI_PATCH=0"):
        check(platform, **changes)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("held", [INT8, AWQ, GPTQ, FOUR], ids=["INT8", "AWQ", "GPTQ", "four bits"])
def test_quantized_language_models_start_on_cpu(held, eager):
    check("cpu", **checkpoint(held, model_enforce_eager=eager))


def test_quantized_language_models_without_a_run_are_refused_by_name():
    for platform, held, name in (
        ("cpu", BLOCKS, "FP8 blocks"),
        ("cpu", CHANNELS, "FP8 weights per channel"),
        ("cuda", GPTQ, "GPTQ"),
        ("cuda", FOUR, "4-bit weights"),
    ):
        refused(platform, f"images with {name}", **checkpoint(held))


@pytest.mark.parametrize(
    "held",
    [
        AWQ | {"lm_head": True},
        {"quant_method": "fp8", "activation_scheme": "static"},
        tensors(INTEGERS | {"strategy": "tensor"}, TOKEN),
        tensors(INTEGERS | {"strategy": "channel"}, INTEGERS | {"strategy": "tensor", "dynamic": False}),
    ],
)
def test_other_schemes_are_refused_beside_images(held):
    for platform in ("cpu", "cuda"):
        refused(platform, "images with quantized weights", **checkpoint(held))


def test_weights_that_are_quantized_while_loading_are_refused_beside_images():
    refused("cuda", "images with quantized weights", **QWEN, model_quantization="fp8")


def test_the_language_model_inside_has_no_schemes_of_its_own():
    """vLLM makes a configuration for it, which has the quantization's name alone."""
    inner = images("Qwen3ForCausalLM") | {"model_quantization": "awq", "model_hf_config": SimpleNamespace()}
    refused("cpu", "its config.json does not describe it", **inner)
    check("cpu", **inner, model_is_submodel_config=True)


def test_two_ranks_need_a_known_model_and_heads_that_they_share_evenly():
    check("cpu", **two())
    check("cpu", **two(architecture="Gemma3ForConditionalGeneration", encoder="siglip_vision_model"))
    for changes in (
        two(heads=15),
        two(parallel_tensor_parallel_size=4),
        two(parallel_pipeline_parallel_size=2),
        two(architecture="Idefics3ForConditionalGeneration", encoder="idefics3_vision"),
        QWEN | {"parallel_pipeline_parallel_size": 2},
        QWEN | {"parallel_data_parallel_size": 2},
    ):
        refused("cpu", "images with several ranks", **changes)


def test_two_ranks_may_encode_whole_images_of_some_models():
    data = {"model_multimodal_config": SimpleNamespace(mm_encoder_tp_mode="data")}
    check("cpu", **two(**data))
    check("cpu", **two(heads=15, **data))
    gemma = {"architecture": "Gemma3ForConditionalGeneration", "encoder": "siglip_vision_model"}
    for changes in (
        two(**gemma, **data),
        two(**data, parallel_tensor_parallel_size=4),
        two(**data, parallel_data_parallel_size=2),
        QWEN | data,
    ):
        refused("cpu", "whole images for each rank", **changes)


def test_adapters_and_drafts_of_the_language_model_start_on_cpu():
    check("cpu", **QWEN, lora=SimpleNamespace())
    check("cpu", **QWEN, speculative=ngram())
    check("cpu", **QWEN, lora=SimpleNamespace(), speculative=ngram())
    refused("cpu", "images with LoRA", **QWEN, lora=SimpleNamespace(enable_tower_connector_lora=True))
    refused("cpu", "images with LoRA", **QWEN, lora=SimpleNamespace(default_mm_loras={"image": "folder"}))
    text = QWEN | {"model_multimodal_config": SimpleNamespace(language_model_only=True)}
    refused("cpu", "LoRA with multimodal models as text models", **text, lora=SimpleNamespace())


def test_others_together_are_refused():
    for changes in (
        checkpoint(INT8, speculative=ngram()),
        checkpoint(AWQ, lora=SimpleNamespace()),
        two(speculative=ngram()),
        checkpoint(AWQ, lora=SimpleNamespace(), speculative=ngram()),
    ):
        refused("cpu", "images with .* and ", **changes)


def test_an_engine_says_which_pair_is_untried():
    said = table.untried(config(**checkpoint(GPTQ, model_enforce_eager=False)), "cpu", Version("0.32.0"))
    assert any(name.startswith("images with GPTQ") and "vLLM compiles" in name for name in said)
    assert not table.untried(config(**checkpoint(GPTQ)), "cpu", Version("0.32.0"))
