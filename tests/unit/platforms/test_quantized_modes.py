"""Quantized weights in modes and models that no run has: named, or refused."""

from types import SimpleNamespace

import pytest
from packaging.version import Version

from bi_patch.errors import UnsupportedFeature
from bi_patch.platforms.features import pairs, quantization, quantized_ranks, table
from bi_patch.settings import Settings

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def latent(name, eager):
    model = SimpleNamespace(
        runner_type="generate",
        is_multimodal_model=False,
        is_encoder_decoder=False,
        is_hybrid=False,
        use_mla=True,
        quantization="fp8",
        architectures=[name],
        enforce_eager=eager,
        hf_config=SimpleNamespace(quantization_config=BLOCKS),
        hf_text_config=SimpleNamespace(),
    )
    parallel = SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1)
    none = dict.fromkeys(("speculative_config", "lora_config", "kv_transfer_config", "quantization_config"))
    return SimpleNamespace(
        model_config=model,
        parallel_config=parallel,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        compilation_config=SimpleNamespace(mode=None),
        use_v2_model_runner=True,
        **none,
    )


@pytest.mark.parametrize("form", ["one", "two"])
@pytest.mark.parametrize("eager", [False, True])
def test_blocks_of_deepseek_v3_name_the_modes_that_no_run_has(monkeypatch, form, eager):
    monkeypatch.setenv("BI_PATCH_MLA", form)
    release, name = Version("0.33.0"), "FP8 blocks of 128 x 128 in DeepSeek V3 with BI_PATCH_MLA=one"
    config = latent("DeepseekV3ForCausalLM", eager)
    table.check(config, "cuda", release)
    assert (name in table.untried(config, "cuda", release)) == (form == "one")


def test_scales_of_powers_of_two_were_measured_with_deepseek_v3_alone():
    other, release = "FP8 blocks with scales of powers of two, in other models", Version("0.33.0")
    config = latent("DeepseekV3ForCausalLM", True)
    config.model_config.hf_config.quantization_config = BLOCKS | {"scale_fmt": "ue8m0"}
    assert other not in table.untried(config, "cuda", release)
    config.model_config.use_mla = False
    assert other in table.untried(config, "cuda", release)


@pytest.mark.parametrize("state", ["is_hybrid", "is_attention_free", "has_inner_state"])
def test_quantized_weights_beside_any_recurrent_state_are_refused(state):
    config = latent("FalconMambaForCausalLM", True)
    config.model_config.use_mla = False
    setattr(config.model_config, state, True)
    with pytest.raises(UnsupportedFeature, match="quantized weights with recurrent layers"):
        table.check(config, "cuda", Version("0.33.0"))


@pytest.mark.parametrize("name", ["DeepseekV2ForCausalLM", "Glm4MoeLiteForCausalLM", "KimiK25ForConditionalGeneration"])
def test_blocks_of_another_model_with_mla_are_refused(name):
    with pytest.raises(UnsupportedFeature, match="quantized weights with MLA"):
        table.check(latent(name, True), "cuda", Version("0.33.0"))


def test_an_fp8_kv_cache_with_blocks_and_mla_has_a_row_of_its_own():
    release, name = Version("0.33.0"), "an FP8 KV cache with FP8 blocks of 128 x 128 in models with MLA"
    config = latent("DeepseekV3ForCausalLM", True)
    config.cache_config.cache_dtype = "fp8"
    table.check(config, "cuda", release)
    (row,) = (row for row in pairs.PAIRS if row.name == name)
    assert row.asked(config)
    config.model_config.hf_config.quantization_config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    assert not row.asked(config)
    with pytest.raises(UnsupportedFeature, match="an FP8 KV cache with other quantized weights"):
        table.check(config, "cuda", release)
    config.model_config.hf_config.quantization_config = BLOCKS
    config.model_config.use_mla = False
    table.check(config, "cuda", release)
    config.model_config.is_moe = True
    with pytest.raises(UnsupportedFeature, match="an FP8 KV cache with other quantized weights"):
        table.check(config, "cuda", release)


def test_the_form_is_that_of_the_settings(monkeypatch):
    monkeypatch.delenv("BI_PATCH_MLA", raising=False)
    assert pairs.one_form() == (Settings().mla == "one")


def test_a_scheme_that_ran_in_eager_mode_only_is_named_in_compiled_code():
    names = [row.name for row in quantization.QUANTIZATION]
    assert set(quantization._COMPILED_RUNS) <= set(names)
    (row,) = (r for r in quantization.QUANTIZATION if r.name.endswith("in another scheme, compiled"))
    static = {"quant_method": "fp8", "activation_scheme": "static"}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    rounded = gptq | {"quant_method": "auto-round", "bits": 8, "packing_format": "auto_round:auto_gptq"}
    oss = {"quant_method": "mxfp4"}
    for held, named in ((rounded, True), (BLOCKS, False), (static, False), (gptq, False), (oss, False)):
        config = latent("LlamaForCausalLM", False)
        config.model_config.hf_config.quantization_config = held
        config.model_config.quantization = held["quant_method"]
        assert bool(row.asked(config)) == named, held
        config.model_config.is_moe = True
        assert bool(row.asked(config)) == named, held
        config.model_config.enforce_eager = True
        assert not row.asked(config)


class Made(str):
    """What vLLM makes of --quantization for a kind of layer."""

    activation = None

    def __str__(self):
        return f"{super().__str__()}_static"


def test_experts_that_ran_in_eager_mode_only_are_named_in_compiled_code():
    (row,) = (r for r in quantization.QUANTIZATION if r.name.endswith("in another scheme, compiled"))
    eight = {"quant_method": "gptq", "bits": 8, "group_size": 128, "sym": True, "desc_act": False}
    for held, method, named in ((eight, "gptq", False), (None, "fp8_per_channel", True)):
        config = latent("LlamaForCausalLM", False)
        config.model_config.use_mla = False
        config.model_config.hf_config.quantization_config = held
        config.model_config.quantization = method
        if held is None:
            config.model_config.quantization_config = SimpleNamespace(linear=Made(method), moe=Made(method))
        assert not row.asked(config), method
        config.model_config.is_moe = True
        assert bool(row.asked(config)) == named, method
        config.model_config.enforce_eager = True
        assert not row.asked(config), method


@pytest.mark.parametrize(
    ("method", "ranks", "eager", "named"),
    [
        ("gptq", 1, False, set()),
        ("gptq", 2, True, set()),
        ("gptq", 2, False, set()),
        ("gptq", 4, False, {"over more than two ranks"}),
        ("gptq", 4, True, {"over more than two ranks"}),
        ("fp8", 2, False, set()),
        ("fp8", 4, False, {"over four ranks"}),
        ("fp8", 8, False, {"over more than two ranks"}),
        ("quark", 2, False, {"other"}),
    ],
)
def test_what_no_run_of_ranks_had_is_named(method, ranks, eager, named):
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    config = latent("LlamaForCausalLM", eager)
    config.model_config.hf_config.quantization_config = {"gptq": gptq, "fp8": BLOCKS}.get(method, gptq)
    config.model_config.quantization = method
    config.parallel_config = SimpleNamespace(tensor_parallel_size=ranks)
    *_, other, four, several = quantized_ranks.SHARED
    rows = {"other": other, "over four ranks": four, "over more than two ranks": several}
    assert all(word in row.name for word, row in rows.items())
    assert {word for word, row in rows.items() if row.asked(config)} == named
