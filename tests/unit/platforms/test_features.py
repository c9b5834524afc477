"""The feature table: each claim has evidence, each refusal happens, and a plain configuration passes."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from feature_configs import Speculative, check, config, draft, images, ngram
from packaging.version import Version

from bi_patch.arming.catalog import CATALOG
from bi_patch.errors import UnsupportedFeature
from bi_patch.platforms import releases
from bi_patch.platforms.features import matrix, model, table
from bi_patch.platforms.features.beside import BESIDE
from bi_patch.platforms.features.cards import CARDS
from bi_patch.platforms.features.engine import FEATURES
from bi_patch.platforms.features.images import IMAGES
from bi_patch.platforms.features.pairs import PAIRS
from bi_patch.platforms.features.versions import VERSIONS

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
DEVICES = {"cpu": re.compile(r"\(\d+ cores\)$"), "cuda": re.compile("^NVIDIA "), "ascend": re.compile("^Ascend")}
SHARED = {
    "parallel_tensor_parallel_size": 2,
    "parallel_enable_expert_parallel": True,
    "model_architectures": ["Qwen3MoeForCausalLM"],
    "model_enforce_eager": False,
}
STEPS = SHARED | {
    "parallel_tensor_parallel_size": 1,
    "parallel_data_parallel_size": 2,
    "parallel_data_parallel_size_local": 2,
    "model_is_moe": True,
}
DEEPSEEK = {"model_architectures": ["DeepseekV2ForCausalLM"], "model_use_mla": True, "model_is_moe": True}
LATENT = DEEPSEEK | {"parallel_tensor_parallel_size": 2, "model_enforce_eager": False}
CUT = {"parallel_enable_expert_parallel": False, "model_is_moe": True}
EAGER = {"model_enforce_eager": True}
FOUR = {"parallel_tensor_parallel_size": 4}
_DATA, _WHOLE = "data parallelism over 1 of a MoE model", "expert parallelism"
_FOUR_DATA = {"parallel_data_parallel_size": 4, "parallel_data_parallel_size_local": 4}
_CUT, _LATENT = "experts with other tensor parallelism", "MLA with other tensor parallelism"
CELLS = [
    *(
        (f"{row.name}, {platform}", platform, cell)
        for row in table.ROWS
        for platform, held in row.cells.items()
        for cell in held
    ),
    *((card.name, card.platform, card.cell) for card in CARDS),
    *(
        (f"{platform} {release}", platform, cell)
        for platform, held in VERSIONS.items()
        for release, cell in held.items()
    ),
]


def offload(**extra):
    return SimpleNamespace(kv_connector="OffloadingConnector", kv_connector_extra_config=extra)


def test_names_are_unique():
    names = [row.name for row in table.ROWS]
    assert len(names) == len(set(names))


def test_every_row_speaks_of_every_platform_and_release():
    for row in table.ROWS:
        for platform, known in releases.BY_PLATFORM.items():
            for release in known:
                assert row.cell(platform, Version(release)) is not model.UNKNOWN, (row.name, platform, release)
    assert {platform: tuple(held) for platform, held in VERSIONS.items()} == releases.BY_PLATFORM


@pytest.mark.parametrize("name, platform, cell", CELLS, ids=[name for name, *_ in CELLS])
def test_a_served_cell_has_evidence_of_no_difference(name, platform, cell):
    assert bool(cell.evidence) == (cell.state == model.SERVED)
    for file in cell.evidence:
        found = json.loads((RESULTS / file).read_text())
        assert found["rows"] and not sum(row["differing"] for row in found["rows"]), file
        assert all(row["compared"] > 0 for row in found["rows"]), file
        assert DEVICES[platform].search(found["device"]), f"{file} is of {found['device']}"


SERVED = [
    (row, platform, cell)
    for row in table.ROWS
    for platform, held in row.cells.items()
    for cell in held
    if cell.state == model.SERVED
]


def _ids(entry):
    return f"{entry[0].name}, {entry[1]}"


@pytest.mark.parametrize("entry", SERVED, ids=_ids)
def test_evidence_is_of_a_release_that_the_cell_speaks_of(entry):
    row, platform, cell = entry
    for file in cell.evidence:
        release = json.loads((RESULTS / file).read_text())["vllm"]
        assert release in releases.BY_PLATFORM[platform], f"{file}: {release}"
        assert row.cell(platform, Version(release)) is cell, f"{file}: another cell speaks of {release}"


@pytest.mark.parametrize("entry", [e for e in SERVED if "ompile" in e[0].name], ids=_ids)
def test_evidence_of_compiled_code_is_of_compiled_code(entry):
    """Names of models say `compiled` on CPU, and `eager` on CUDA, where compiled code is the rule."""
    _, platform, cell = entry
    rows = [row for file in cell.evidence for row in json.loads((RESULTS / file).read_text())["rows"]]
    if platform == "cpu":
        assert any("compiled" in row["model"] or "compiled" in row["axis"] for row in rows)
    else:
        assert any("eager" not in row["model"] for row in rows)


AXES = {
    matrix.GRAMMARS: {"structured output"},
    matrix.CACHED: {"prefix cache"},
    matrix.PREEMPTED: {"preemption"},
    # The other two axes compare logprobs of each position.
    matrix.LOGPROBS: {"prompt logprobs", "logprobs in any order", "LoRA", "speculative decoding"},
}


@pytest.mark.parametrize("entry", [e for e in SERVED if e[0] in matrix.MATRIX], ids=_ids)
def test_evidence_of_a_pair_has_the_axis_of_each_part(entry):
    row, _, cell = entry
    axes = {held["axis"] for file in cell.evidence for held in json.loads((RESULTS / file).read_text())["rows"]}
    for part in row.name.split(" with "):
        assert part in matrix.ENGINES or axes & AXES[part], (part, sorted(axes))


def test_a_refusal_gives_its_reason_and_what_refuses():
    trainer = {"training.device"}  # a trainer refuses for itself, and no engine is asked
    known = {item.name for item in (*CATALOG.seams, *CATALOG.policies)} | trainer
    for row in table.ROWS:
        for cell in (cell for held in row.cells.values() for cell in held if cell.state == model.REFUSED):
            assert cell.why and (not cell.by or cell.by in known), (row.name, cell)
    for row in (*FEATURES, *IMAGES, *PAIRS, *BESIDE):
        refused = [cell for held in row.cells.values() for cell in held if cell.state == model.REFUSED]
        assert row.asked is not None or all(cell.by for cell in refused), row.name


@pytest.mark.parametrize("platform", releases.BY_PLATFORM)
def test_a_plain_configuration_passes(platform):
    check(platform)
    check(platform, cache_cache_dtype="bfloat16")
    if platform == "cpu":
        check(platform, speculative=ngram())
    oldest = Version(releases.BY_PLATFORM[platform][0])
    table.check(SimpleNamespace(**(vars(config()) | {"model_config": None})), platform, oldest)


@pytest.mark.parametrize("platform", releases.BY_PLATFORM)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_quantization": "awq"}, "quantized weights .awq"),
        ({"cache_cache_dtype": "fp8_e5m2"}, "'fp8_e5m2' KV cache"),
        ({"cache_cache_dtype": "fp8", "speculative": ngram()}, "an FP8 KV cache with speculative"),
        ({"cache_cache_dtype": "fp8", "model_quantization": "fp8"}, "an FP8 KV cache with other quantized weights"),
        ({"model_use_mla": True, "model_hf_text_config": SimpleNamespace(index_topk=8)}, "sparse MLA"),
        ({"model_is_hybrid": True}, "hybrid and state-space models"),
        ({"model_is_encoder_decoder": True}, "encoder-decoder models"),
        (images("Phi3VForCausalLM"), "multimodal inputs of Phi3VForCausalLM"),
        (images("LlavaForConditionalGeneration", "siglip_vision_model"), "multimodal inputs of Llava"),
        (images("Gemma3ForConditionalGeneration", model_is_mm_prefix_lm=True), "multimodal inputs of Gemma3"),
        (
            images("Idefics3ForConditionalGeneration", lora=SimpleNamespace(enable_tower_connector_lora=True)),
            "images with LoRA",
        ),
        (images("Idefics3ForConditionalGeneration", speculative=draft()), "images with speculative decoding"),
        (images("Idefics3ForConditionalGeneration", model_quantization="fp8"), "images with quantized weights"),
        (images("Idefics3ForConditionalGeneration", parallel_tensor_parallel_size=2), "images with several ranks"),
        (images("Idefics3ForConditionalGeneration", model_enable_prompt_embeds=True), "images with prompt embed"),
        (images("Idefics3ForConditionalGeneration", mm_encoder_tp_mode="data"), "images with whole images"),
        (images("Idefics3ForConditionalGeneration", compilation_compile_mm_encoder=True), "images with a compiled"),
        (images("Idefics3ForConditionalGeneration", compilation_cudagraph_mm_encoder=True), "images with CUDA graphs"),
        (
            images("Idefics3ForConditionalGeneration", mm_processor_kwargs={"device": "cuda"}),
            "images with images that a GPU prepares",
        ),
        ({"watermark": SimpleNamespace(key=1)}, "watermarks"),
        ({"speculative": SimpleNamespace()}, "speculative decoding"),
        ({"speculative": SimpleNamespace(method="mtp")}, "speculative decoding with other drafts"),
        ({"speculative": SimpleNamespace(method="medusa")}, "speculative decoding with other drafts"),
        ({"speculative": SimpleNamespace(method="ngram_gpu")}, "speculative decoding with other drafts"),
        (images("LlavaOnevisionForConditionalGeneration", "clip_vision_model"), "multimodal inputs of LlavaOne"),
        ({"speculative": ngram(rejection_sample_method="synthetic")}, "another rule of acceptance"),
        ({"speculative": ngram(rejection_sample_method="fly")}, "another rule of acceptance"),
        ({"speculative": ngram(draft_sample_method="probabilistic")}, "the option draft_sample_method"),
        ({"speculative": ngram(parallel_drafting=True)}, "the option parallel_drafting"),
        ({"speculative": draft(quantization="awq")}, "a draft model with quantized weights"),
        ({"speculative": draft(use_mla=True, is_moe=True)}, "a draft model with MLA, a draft model with experts"),
        ({"speculative": draft(), "lora": SimpleNamespace()}, "LoRA with a draft model or heads"),
        ({"speculative": ngram(), "model_has_inner_state": True}, "speculative decoding with recurrent layers"),
        ({"speculative": draft(), "model_use_mla": True}, "a draft model or heads with MLA"),
        ({"speculative": ngram(), "parallel_tensor_parallel_size": 2}, "speculative decoding with several ranks"),
        (
            {"speculative": ngram(), "model_logits_processors": ["x"]},
            "speculative decoding with custom",
        ),
        ({"kv_transfer": SimpleNamespace()}, "KV transfer"),
        ({"kv_transfer": SimpleNamespace(kv_connector="NixlConnector")}, "KV transfer .NixlConnector"),
        ({"kv_transfer": offload(spec_name="TieringOffloadingSpec")}, "KV transfer .OffloadingConnector"),
        ({"kv_transfer": offload(disk_path="/disk")}, "KV transfer .OffloadingConnector"),
        ({"parallel_data_parallel_size": 2, "model_is_moe": True}, "data parallelism over 1 of a MoE model"),
        ({"model_is_diffusion": True}, "diffusion language models"),
        (
            {
                "model_is_multimodal_model": True,
                "model_multimodal_config": SimpleNamespace(language_model_only=True, enable_mm_embeds=True),
            },
            "multimodal embeddings",
        ),
        (
            {"parallel_enable_expert_parallel": True, "model_quantization": "fp8"},
            "expert parallelism with quantized weights",
        ),
        (
            {"parallel_enable_expert_parallel": True, "parallel_data_parallel_size": 2, "model_is_moe": False},
            "expert parallelism with .*data parallelism",
        ),
        (
            {"parallel_enable_expert_parallel": True, "parallel_pipeline_parallel_size": 2},
            "expert parallelism with pipeline or context parallelism",
        ),
        ({"parallel_enable_eplb": True}, "expert load balancing"),
        ({"parallel_decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"parallel_enable_dbo": True}, "dual-batch overlap"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(platform, change, said):
    with pytest.raises(UnsupportedFeature, match=f"features: .*{said}.*BI_PATCH=0"):
        check(platform, **change)


def test_lora_is_refused_where_it_has_no_patch_points():
    check("cpu", lora=SimpleNamespace())
    check("cuda", "0.33.0", lora=SimpleNamespace())
    for platform, release in (("cuda", "0.32.0"), ("ascend", None)):
        with pytest.raises(UnsupportedFeature, match="features: .*LoRA"):
            check(platform, release, lora=SimpleNamespace())


def test_weights_in_the_hosts_memory_are_recognized():
    row = next(row for row in table.ROWS if row.name.startswith("weights in the host's memory"))
    for held in (
        {"offload": SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=1.5), prefetch=None)},
        {"offload": SimpleNamespace(uva=None, prefetch=SimpleNamespace(offload_group_size=2))},
        {"cache_cpu_offload_gb": 1},
    ):
        assert row.asked(config(**held)) == "weights in the host's memory", held
    assert row.asked(config()) == ""


def test_ranks_are_untried_on_cpu_where_no_run_had_as_many():
    def untried(tensor, pipeline=1, data=1, **changes):
        sizes = {"tensor": tensor, "pipeline": pipeline, "data": data}
        given = {f"parallel_{kind}_parallel_size": size for kind, size in sizes.items()}
        return set(table.untried(config(**given, **changes), "cpu", Version("0.32.0")))

    recurrent = "recurrent layers with tensor parallelism over more than two ranks"
    both = "two kinds of tensor, pipeline and data parallelism, of which one has more than two ranks"
    state = {"model_is_hybrid": True, "model_architectures": ["Qwen3NextForCausalLM"]}
    assert recurrent not in untried(2, **state) and recurrent not in untried(4)
    assert recurrent in untried(3, **state) and recurrent in untried(4, **state)
    for few in ((2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1), (1, 4, 1), (1, 1, 4)):
        assert both not in untried(*few), few
    for many in ((4, 2, 1), (2, 3, 1), (2, 1, 4), (1, 3, 2), (2, 2, 2)):
        assert both in untried(*many), many


def test_an_fp8_kv_cache_is_refused_where_it_was_not_tried():
    check("cuda", "0.33.0", cache_cache_dtype="fp8")
    for platform, release in (("cpu", None), ("cuda", "0.32.0"), ("ascend", None)):
        with pytest.raises(UnsupportedFeature, match="features: .*'fp8' KV cache"):
            check(platform, release, cache_cache_dtype="fp8")


def test_norms_over_ranks_are_refused_where_they_have_no_patch_point():
    shared = {"parallel_tensor_parallel_size": 2, "model_architectures": ["MiniMaxM2ForCausalLM"]}
    check("cuda", "0.33.0", **shared)
    for platform, release in (("cpu", None), ("cuda", "0.32.0"), ("ascend", None)):
        with pytest.raises(UnsupportedFeature, match="features: .*norms over ranks"):
            check(platform, release, **shared)


def test_mla_is_refused_where_it_has_no_kernel():
    check("cpu", model_use_mla=True)
    check("cuda", "0.33.0", model_use_mla=True)
    check("cuda", "0.33.0", model_use_mla=True, cache_cache_dtype="fp8")
    for changes in ({"model_quantization": "fp8"}, {"lora": SimpleNamespace()}, {"cache_cache_dtype": "fp8_e5m2"}):
        with pytest.raises(UnsupportedFeature, match="features: "):
            check("cuda", "0.33.0", **{"model_use_mla": True, "cache_cache_dtype": "fp8"} | changes)
    for platform, release in (("cuda", "0.32.0"), ("cuda", "0.23.0"), ("ascend", None)):
        with pytest.raises(UnsupportedFeature, match="features: .*MLA"):
            check(platform, release, model_use_mla=True)


def test_pooling_is_refused_where_it_was_not_tried():
    encoder = {"model_runner_type": "pooling", "model_attn_type": "encoder_only"}
    check("cpu", **encoder)
    check("cuda", **encoder)
    for held in (encoder, {"model_runner_type": "pooling"}):
        with pytest.raises(UnsupportedFeature, match="pooling models: nobody tried it with these releases"):
            check("cuda", "0.26.0", **held)
    with pytest.raises(UnsupportedFeature, match="features: .*pooling models.*BI_PATCH=0"):
        check("ascend", model_runner_type="pooling")


def test_scores_of_decoders_have_a_row_of_their_own():
    def asked(**changes):
        held = config(model_runner_type="pooling", **changes)
        return [row.name for row in table.ROWS if row.asked is not None and row.asked(held)]

    name = "pooling: classifiers, rerankers and rewards made from decoders"
    for given in (
        {"model_architectures": ["Qwen2ForRewardModel"]},
        {"model_architectures": ["Qwen2ForProcessRewardModel"]},
        {"model_architectures": ["LlamaForSequenceClassification"]},
        {"model_architectures": ["Qwen3ForCausalLM"], "model_convert_type": "classify"},
    ):
        assert name in asked(**given)
    assert name not in asked(model_architectures=["Qwen3ForCausalLM"], model_convert_type="embed")
    assert name not in asked(
        model_architectures=["XLMRobertaForSequenceClassification"], model_attn_type="encoder_only"
    )


def test_several_refusals_are_named_at_once_with_what_to_do():
    with pytest.raises(UnsupportedFeature) as caught:
        check("cuda", lora=SimpleNamespace(), model_quantization="awq")
    assert all(
        said in str(caught.value)
        for said in ("LoRA with quantized", "quantized weights (awq", "Use unquantized weights", "Use one of them")
    )


@pytest.mark.parametrize(
    ("platform", "change", "refused"),
    [
        *(
            (
                platform,
                {
                    "model_architectures": ["Cohere2MoeForCausalLM"],
                    "model_hf_text_config": SimpleNamespace(expert_selection_fn="sigmoid"),
                },
                platform != "cpu",
            )
            for platform in releases.BY_PLATFORM
        ),
        ("cpu", {"cache_cache_dtype": "float32"}, False),
        ("cuda", {"cache_cache_dtype": "float32"}, True),
        ("cpu", {"parallel_tensor_parallel_size": 2}, False),
        ("cuda", {"parallel_tensor_parallel_size": 4}, False),
        ("ascend", {"parallel_tensor_parallel_size": 2}, False),
        ("cpu", {"parallel_tensor_parallel_size": 2, "parallel_enable_expert_parallel": True}, True),
        ("cuda", SHARED, False),
        ("cuda", SHARED | {"parallel_tensor_parallel_size": 4, "model_enforce_eager": True}, False),
        ("cuda", SHARED | {"parallel_tensor_parallel_size": 8}, True),
        ("cuda", SHARED | {"parallel_all2all_backend": "passthrough"}, True),
        ("cuda", SHARED | {"parallel_expert_placement_strategy": "round_robin"}, True),
        ("cuda", SHARED | {"model_architectures": ["MixtralForCausalLM"]}, True),
        ("cuda", SHARED | {"model_architectures": ["DeepseekV3ForCausalLM"], "model_use_mla": True}, False),
        ("ascend", {"parallel_tensor_parallel_size": 2, "parallel_enable_expert_parallel": True}, True),
        ("cpu", {"parallel_data_parallel_size": 2, "model_is_moe": False}, False),
        ("cuda", {"parallel_data_parallel_size": 2, "model_is_moe": False}, False),
        ("ascend", {"parallel_data_parallel_size": 2, "model_is_moe": False}, True),
        ("cuda", STEPS, False),
        ("cuda", STEPS | {"parallel_enable_expert_parallel": False, "parallel_tensor_parallel_size": 2}, False),
        ("cpu", STEPS, True),
        ("ascend", STEPS, True),
        ("cuda", STEPS | {"parallel_data_parallel_size": 8}, True),
        ("cuda", STEPS | {"parallel_all2all_backend": "deepep_high_throughput"}, True),
        ("cuda", STEPS | {"parallel_pipeline_parallel_size": 2}, True),
        ("cuda", STEPS | {"parallel_nnodes": 2}, True),
        ("cuda", STEPS | {"model_quantization": "fp8"}, True),
        ("cuda", STEPS | {"model_architectures": ["GptOssForCausalLM"]}, True),
        ("cuda", STEPS | {"lora": SimpleNamespace()}, True),
        ("cuda", FOUR | {"parallel_disable_custom_all_reduce": True}, True),
        ("cuda", FOUR | EAGER | {"parallel_disable_custom_all_reduce": True}, False),
        ("cuda", {"parallel_tensor_parallel_size": 3}, True),
        ("cuda", {"parallel_tensor_parallel_size": 2, "parallel_disable_custom_all_reduce": True}, False),
        ("cpu", {"parallel_tensor_parallel_size": 3}, False),
        ("cpu", {"parallel_pipeline_parallel_size": 2}, False),
        ("cuda", {"kv_transfer": offload(cpu_bytes_to_use=1)}, False),
        ("cpu", {"kv_transfer": offload()}, True),
    ],
)
def test_platforms_differ(platform, change, refused):
    if not refused:
        check(platform, **change)
        return
    with pytest.raises(UnsupportedFeature):
        check(platform, **change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"parallel_pipeline_parallel_size": 2, "parallel_tensor_parallel_size": 4},
            "ranks of two kinds, more than two by two",
        ),
        (
            {"parallel_tensor_parallel_size": 2, "model_is_hybrid": True, "model_architectures": ["JambaForCausalLM"]},
            "recurrent layers with other ranks",
        ),
        ({"parallel_tensor_parallel_size": 8, "cache_cache_dtype": "fp8"}, "an FP8 KV cache with other ranks"),
        (STEPS | {"parallel_data_parallel_size": 3}, "data parallelism over 1 of a MoE model"),
        (SHARED | {"parallel_tensor_parallel_size": 3, "model_enforce_eager": True}, "expert parallelism"),
    ],
)
def test_an_engine_of_several_gpus_names_what_nobody_measured(change, named):
    given = config(**change)
    held = (row for row in table.ROWS if row.asked is not None and row.asked(given))
    found = {row.asked(given) for row in held if row.cell("cuda").state == model.UNTRIED}
    assert named in found
    eager = config(**change | {"model_enforce_eager": True})
    assert not any(row.asked(eager) for row in table.ROWS if row.name == "pipeline parallelism, compiled")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (SHARED, ""),
        (SHARED | EAGER, ""),
        (SHARED | FOUR, ""),
        (SHARED | EAGER | {"parallel_tensor_parallel_size": 3}, _WHOLE),
        (SHARED | DEEPSEEK, ""),
        (SHARED | DEEPSEEK | EAGER, ""),
        (SHARED | DEEPSEEK | FOUR, ""),
        (SHARED | FOUR | EAGER, _WHOLE),
        (SHARED | DEEPSEEK | FOUR | EAGER, f"{_LATENT}, {_WHOLE}"),
        (SHARED | CUT, ""),
        (SHARED | CUT | EAGER, ""),
        (SHARED | CUT | FOUR, ""),
        (SHARED | CUT | FOUR | EAGER, ""),
        (SHARED | CUT | {"parallel_tensor_parallel_size": 8}, _CUT),
        (SHARED | CUT | {"model_architectures": ["MixtralForCausalLM"]}, _CUT),
        (LATENT, ""),
        (LATENT | EAGER, ""),
        (LATENT | FOUR, f"{_LATENT}, {_CUT}"),
        (LATENT | {"model_architectures": ["DeepseekV3ForCausalLM"]}, f"{_LATENT}, {_CUT}"),
        (STEPS, ""),
        (STEPS | CUT, ""),
        (STEPS | EAGER, ""),
        (STEPS | EAGER | CUT, ""),
        (STEPS | DEEPSEEK | EAGER, ""),
        (STEPS | DEEPSEEK, ""),
        (STEPS | DEEPSEEK | CUT, _DATA),
        *((STEPS | sizes, "") for sizes in (_FOUR_DATA, {"parallel_tensor_parallel_size": 2})),
        *((STEPS | CUT | sizes, "") for sizes in (_FOUR_DATA, {"parallel_tensor_parallel_size": 2})),
        (STEPS | DEEPSEEK | _FOUR_DATA, _DATA),
        (STEPS | DEEPSEEK | {"model_architectures": ["DeepseekV3ForCausalLM"]}, ""),
        (STEPS | {"parallel_data_parallel_size": 3, "parallel_data_parallel_size_local": 3}, _DATA),
        (STEPS | {"parallel_data_parallel_size_local": 1}, _DATA),
        (STEPS | {"parallel_data_parallel_size_local": 0}, _DATA),
        (STEPS | {"parallel_data_parallel_external_lb": True}, _DATA),
        (STEPS | {"parallel_data_parallel_hybrid_lb": True}, _DATA),
    ],
)
def test_what_no_run_of_ranks_has_is_named(change, named):
    given = config(**change)
    words = (_DATA, _WHOLE, _CUT, _LATENT)
    asked = [(row.asked(given), row.cell("cuda").state) for row in table.ROWS if row.asked is not None]
    assert ", ".join(sorted(said for said, state in asked if said in words and state == model.UNTRIED)) == named
    assert not any(state == model.REFUSED and said for said, state in asked)


def test_mla_in_one_form_over_ranks_is_named(monkeypatch):
    monkeypatch.setenv("BI_PATCH_MLA", "one")
    assert [row for row in table.ROWS if row.asked is not None and row.asked(config(**LATENT)) == _LATENT]


def test_text_of_a_multimodal_model_is_served_on_cpu_and_cuda():
    text = {
        "model_is_multimodal_model": True,
        "model_multimodal_config": SimpleNamespace(language_model_only=True),
    }
    check("cuda", **text)
    check("cpu", **text)
    with pytest.raises(UnsupportedFeature, match="multimodal models"):
        check("ascend", **text)


def test_every_pair_of_what_people_turn_on_has_a_row():
    parts = (*matrix.ENGINES, *matrix.REQUESTS)
    named = [name for row in PAIRS for name in _both(row.name)] + [row.name for row in matrix.MATRIX]
    for i, first in enumerate(parts):
        for other in parts[i + 1 :]:
            assert named.count(f"{first} with {other}") == 1, (first, other)


def _both(name: str) -> list[str]:
    """The pairs of a row's name: "A with B, C" is "A with B" and "A with C"."""
    first, _, others = name.partition(" with ")
    return [f"{first} with {other}" for other in others.split(", ")]


def test_images_of_known_models_are_served_on_cpu():
    known = images("Idefics3ForConditionalGeneration")
    check("cpu", **known)
    with pytest.raises(UnsupportedFeature, match="images of Idefics3ForConditionalGeneration"):
        check("ascend", **known)
    # vLLM makes a configuration for the language model, too.
    check("cpu", **images("LlamaForCausalLM"))


@pytest.mark.parametrize(
    ("architecture", "encoder"),
    [
        ("Mistral3ForConditionalGeneration", "pixtral"),
        ("LlavaForConditionalGeneration", "clip_vision_model"),
        ("LlavaForConditionalGeneration", "pixtral"),
        ("Glm4vMoeForConditionalGeneration", "glm4v_moe_vision"),
        ("Idefics3ForConditionalGeneration", "idefics3_vision"),
        ("Gemma3ForConditionalGeneration", "siglip_vision_model"),
        ("Qwen3VLForConditionalGeneration", "qwen3_vl"),
        ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"),
    ],
)
@pytest.mark.parametrize("eager", [False, True])
def test_images_on_cpu_are_served_eager_and_compiled(architecture, encoder, eager):
    known = images(architecture, encoder, model_enforce_eager=eager)
    check("cpu", **known)
    check("cpu", **known, model_is_mm_prefix_lm=architecture.startswith("Gemma3"))
    with pytest.raises(UnsupportedFeature, match="images with pooling"):
        check("cpu", **known | {"model_runner_type": "pooling"})
    with pytest.raises(UnsupportedFeature, match="multimodal inputs of"):
        check("cpu", **images(architecture, "another_tower"))


def test_images_that_no_run_has_are_refused():
    pali = images("PaliGemmaForConditionalGeneration", "siglip_vision_model", model_is_mm_prefix_lm=True)
    for platform in ("cpu", "cuda"):
        with pytest.raises(UnsupportedFeature, match="multimodal inputs of PaliGemma"):
            check(platform, **pali)


@pytest.mark.parametrize(
    ("architecture", "encoder"),
    [
        ("Qwen3VLForConditionalGeneration", "qwen3_vl"),
        ("Mistral3ForConditionalGeneration", "pixtral"),
        ("LlavaForConditionalGeneration", "clip_vision_model"),
        ("Idefics3ForConditionalGeneration", "idefics3_vision"),
        ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"),
        ("Gemma3ForConditionalGeneration", "siglip_vision_model"),
    ],
)
@pytest.mark.parametrize("eager", [False, True])
def test_images_of_known_models_are_served_on_cuda(architecture, encoder, eager):
    both = architecture.startswith("Gemma3")
    known = images(architecture, encoder, model_enforce_eager=eager, model_is_mm_prefix_lm=both)
    check("cuda", **known)
    with pytest.raises(UnsupportedFeature, match="images of .*Use vLLM 0.33"):
        check("cuda", "0.32.0", **known)
    with pytest.raises(UnsupportedFeature, match="images with pooling"):
        check("cuda", **known | {"model_runner_type": "pooling"})
    with pytest.raises(UnsupportedFeature, match="images in model runner V1: .*Use model runner V2"):
        check("cuda", **known, second_runner=False)


def test_offload_is_refused_before_it_keeps_prompt_logprobs():
    check("cuda", "0.32.0", kv_transfer=offload())
    with pytest.raises(UnsupportedFeature, match="KV offload"):
        check("cuda", "0.26.0", kv_transfer=offload())


@pytest.mark.parametrize("state", ["model_is_hybrid", "model_is_attention_free", "model_has_inner_state"])
def test_recurrent_layers_are_served_by_kind(state):
    for name, words in (("Qwen3NextForCausalLM", "gated delta nets"), ("Mamba2ForCausalLM", "Mamba 2")):
        given = {state: True, "model_architectures": [name]}
        check("cpu", **given)
        check("cuda", **given)
        for platform, release in (("cuda", "0.32.0"), ("ascend", None)):
            with pytest.raises(UnsupportedFeature, match=words):
                check(platform, *[release] * bool(release), **given)
    for name, words in (
        ("Lfm2ForCausalLM", "short convolutions"),
        ("MambaForCausalLM", "Mamba 1"),
        ("FalconMambaForCausalLM", "Mamba 1"),
        ("JambaForCausalLM", "Mamba 1"),
    ):
        given = {state: True, "model_architectures": [name]}
        check("cpu", **given)
        for eager in (False, True):
            check("cuda", **given, model_enforce_eager=eager)
        with pytest.raises(UnsupportedFeature, match=words):
            check("cuda", "0.32.0", **given, model_enforce_eager=True)
    given = {state: True, "model_architectures": ["KimiLinearForCausalLM"]}
    check("cuda", **given)
    for platform, release in (("cpu", None), ("cuda", "0.32.0"), ("ascend", None)):
        with pytest.raises(UnsupportedFeature, match="Kimi delta attention"):
            check(platform, *[release] * bool(release), **given)
    for platform in releases.BY_PLATFORM:
        with pytest.raises(UnsupportedFeature, match="hybrid and state-space models"):
            check(platform, **{state: True, "model_architectures": ["Zamba2ForCausalLM"]})


def test_what_is_untried_is_named_for_the_line_that_says_armed():
    def untried(platform, release, **changes):
        return table.untried(config(**changes), platform, Version(release))

    assert untried("cpu", "0.32.0", model_dtype="torch.bfloat16") == ()
    assert untried("cpu", "0.32.0", model_dtype="torch.float16") == ()
    assert untried("ascend", releases.BY_PLATFORM["ascend"][-1], model_dtype="torch.float16")[-1] == "fp16 weights"
    assert untried("cuda", "0.32.0", model_dtype="torch.float32") == ("vLLM 0.32.0 on CUDA", "fp32 weights")


def test_n_grams_on_cuda_need_model_runner_v2_and_a_new_release():
    def ask(release, second):
        given = vars(config(speculative=ngram())) | {"use_v2_model_runner": second}
        table.check(SimpleNamespace(**given), "cuda", Version(release))

    ask("0.33.0", True)
    for release, second, said in (("0.33.0", False, "on model runner V1"), ("0.32.0", True, "with n-grams")):
        with pytest.raises(UnsupportedFeature, match=said):
            ask(release, second)


def test_n_grams_beside_adapters_and_fp8_on_cuda():
    """With FP8 that vLLM makes while it loads, not with checkpoints of other schemes; compiled code is untried on
    CPU."""

    def asked(check, release="0.33.0", **changes):
        return check(config(speculative=ngram(), **changes), "cuda", Version(release))

    fp8 = {"model_quantization": "fp8", "model_hf_config": SimpleNamespace()}
    name = "two of LoRA, speculation and quantized weights, in an engine that vLLM compiles"
    for changes in ({"lora": SimpleNamespace()}, fp8):
        asked(table.check, **changes)
        assert name not in asked(table.untried, **changes)
        held = config(speculative=ngram(), **changes)
        assert name in table.untried(held, "cpu", Version("0.32.0"))
        with pytest.raises(UnsupportedFeature, match="Use vLLM 0.33"):
            asked(table.check, "0.32.0", **changes)
    blocks = {"model_hf_config": SimpleNamespace(quantization_config={"weight_block_size": [128, 128]})}
    with pytest.raises(UnsupportedFeature, match="quantized weights other than FP8 made while loading"):
        asked(table.check, **fp8 | blocks)
    with pytest.raises(UnsupportedFeature, match="LoRA with speculative decoding and quantized weights"):
        asked(table.check, **fp8, lora=SimpleNamespace())


def test_n_grams_of_a_model_with_mla_are_served_on_cpu_only():
    check("cpu", speculative=ngram(), model_use_mla=True)
    for platform in ("cuda", "ascend"):
        with pytest.raises(UnsupportedFeature, match="speculative decoding with MLA"):
            check(platform, speculative=ngram(), model_use_mla=True)


def test_suffixes_are_served_on_cpu_only():
    check("cpu", speculative=Speculative(method="suffix"))
    for platform in ("cuda", "ascend"):
        with pytest.raises(UnsupportedFeature, match="speculative decoding with suffixes"):
            check(platform, speculative=Speculative(method="suffix"))


def test_workers_of_ray_are_refused_on_cpu_before_vllm_looks_for_them():
    for field in ("distributed_executor_backend", "data_parallel_backend"):
        with pytest.raises(UnsupportedFeature, match="workers of Ray: .*does not support ray.*Use the executor mp"):
            check("cpu", **{f"parallel_{field}": "ray"})
        check("cuda", **{f"parallel_{field}": "ray"})


def own_heads(architecture="MiMoMTPModel", owner="MiMoForCausalLM", **model):
    heads = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]), **model)
    target = SimpleNamespace(architectures=[owner])
    return Speculative(method="mtp", draft_model_config=heads, target_model_config=target)


def test_a_models_own_heads_are_served_for_mimo_on_cpu():
    check("cpu", speculative=own_heads())
    with pytest.raises(UnsupportedFeature, match="a model's own heads"):
        check("cuda", speculative=own_heads())
    for other in ("DeepSeekMTPModel", "Qwen3NextMTP", "Glm4MoeMTPModel"):
        with pytest.raises(UnsupportedFeature, match="speculative decoding with other drafts"):
            check("cpu", speculative=own_heads(other))
    with pytest.raises(UnsupportedFeature, match="speculative decoding with other drafts"):
        check("cpu", speculative=own_heads(owner="Qwen2ForCausalLM"))
    with pytest.raises(UnsupportedFeature, match="a draft model with quantized weights"):
        check("cpu", speculative=own_heads(quantization="awq"))
    with pytest.raises(UnsupportedFeature, match="LoRA with a draft model or heads"):
        check("cpu", speculative=own_heads(), lora=SimpleNamespace())


def test_compiled_drafts_are_named_on_cpu():
    name = "speculative decoding with a draft model, heads or suffixes, compiled"
    release = Version("0.32.0")
    for drafts in (own_heads(), Speculative(method="suffix")):
        assert name in table.untried(config(speculative=drafts), "cpu", release)
        assert name not in table.untried(config(speculative=drafts, model_enforce_eager=True), "cpu", release)
    assert name not in table.untried(config(speculative=ngram()), "cpu", release)


def test_images_of_internvl_are_served_without_norms_of_queries():
    given = images("InternVLForConditionalGeneration", "internvl_vision")
    check("cpu", **given)
    check("cuda", **given)
    with pytest.raises(UnsupportedFeature, match="bi_patch has patch points for newer releases only"):
        check("cuda", release="0.32.0", **given)
    encoder = SimpleNamespace(model_type="internvl_vision", use_qk_norm=True)
    for platform in ("cpu", "cuda"):
        with pytest.raises(UnsupportedFeature, match="multimodal inputs of InternVLForConditionalGeneration"):
            check(platform, **given | {"model_hf_config": SimpleNamespace(vision_config=encoder)})
    chat = images("InternVLChatModel", "intern_vit_6b")
    large = SimpleNamespace(model_type="intern_vit_6b", qk_normalization=True, norm_type="rms_norm")
    for platform in ("cpu", "cuda"):
        check(platform, **chat)
        with pytest.raises(UnsupportedFeature, match="multimodal inputs of InternVLChatModel"):
            check(platform, **chat | {"model_hf_config": SimpleNamespace(vision_config=large)})


def test_adapters_beside_fp8_on_cuda():
    """With FP8 that vLLM makes while it loads, not with checkpoints of other schemes; also compiled."""

    def asked(check, release="0.33.0", **changes):
        return check(config(lora=SimpleNamespace(), model_quantization="fp8", **changes), "cuda", Version(release))

    own = {"model_hf_config": SimpleNamespace()}
    name = "two of LoRA, speculation and quantized weights, in an engine that vLLM compiles"
    asked(table.check, **own)
    assert name not in asked(table.untried, **own)
    with pytest.raises(UnsupportedFeature, match="Use vLLM 0.33"):
        asked(table.check, "0.32.0", **own)
    blocks = SimpleNamespace(quantization_config={"weight_block_size": [128, 128]})
    with pytest.raises(UnsupportedFeature, match="LoRA with quantized weights other than FP8 made while loading"):
        asked(table.check, model_hf_config=blocks)


def test_an_encoder_of_qwen_may_have_a_backend_of_its_own_on_cuda():
    for name in ("FLASHINFER", "TRITON_ATTN", "FLASH_ATTN", "TORCH_SDPA"):
        changes = images("Qwen3VLForConditionalGeneration", "qwen3_vl", mm_encoder_attn_backend=name)
        known = name in ("FLASH_ATTN", "TORCH_SDPA")
        for platform, release in (("cpu", "0.32.0"), ("cuda", "0.32.0"), *([] if known else [("cuda", "0.33.0")])):
            with pytest.raises(UnsupportedFeature, match="encoder"):
                check(platform, release, **changes)
        if known:
            other = images("LlavaForConditionalGeneration", "clip_vision_model", mm_encoder_attn_backend=name)
            with pytest.raises(UnsupportedFeature, match="encoder"):
                check("cuda", "0.33.0", **other)
            check("cuda", "0.33.0", **changes)
            row = next(row for row in table.ROWS if "--mm-encoder-attn-backend" in row.name)
            assert row.asked(config(**changes)) == f"images with the encoder on {name}"


def test_an_engine_names_the_untried_pairs_of_which_it_has_its_part():
    def untried(**changes):
        return table.untried(config(**changes), "cuda", Version("0.33.0"))

    assert untried(lora=SimpleNamespace()) == ()
    assert untried(speculative=ngram()) == ()
    assert untried() == ()


def test_a_pair_with_prefix_caching_is_there_only_with_the_cache():
    row = next(row for row in table.ROWS if row.name == "speculative decoding with prefix caching")
    assert row.asked(config(speculative=ngram())) == row.name
    assert row.asked(config(speculative=ngram(), cache_enable_prefix_caching=False)) == ""
    assert row.asked(config()) == ""


def test_modes_that_no_run_has_are_named():
    def untried(platform, **changes):
        return table.untried(config(**changes), platform, Version(releases.BY_PLATFORM[platform][-1]))

    def hybrid(name):
        return {"model_is_hybrid": True, "model_architectures": [name]}

    for platform in ("cpu", "cuda"):
        assert "Mamba 2 (the first models)" not in untried(platform, **hybrid("Mamba2ForCausalLM"))
    assert "Jamba, compiled" not in untried("cpu", **hybrid("JambaForCausalLM"))
    assert not {"Nemotron-H", "Nemotron-H, compiled"} & set(untried("cuda", **hybrid("NemotronHForCausalLM")))
    idefics = images("Idefics3ForConditionalGeneration", model_enforce_eager=False)
    assert "images of Idefics3 and Qwen2.5-VL, in an engine that vLLM compiles" not in untried("cuda", **idefics)
    assert "images of LLaVA with CLIP and Idefics3 with preemption" in untried("cuda", **idefics)
    qwen = images("Qwen3VLForConditionalGeneration", "qwen3_vl", model_enforce_eager=False)
    assert not [name for name in untried("cuda", **qwen) if name.startswith("images of")]
