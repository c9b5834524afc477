"""Stand-ins of vLLM's configurations for tests of the feature table."""

import dataclasses
from types import SimpleNamespace

from packaging.version import Version

from bi_patch.platforms import releases
from bi_patch.platforms.features import table


def config(second_runner=True, **changes):
    """A plain configuration with changes to its parts, e.g. model_quantization="fp8"."""
    parts = {
        "model": {
            "runner_type": "generate",
            "is_multimodal_model": False,
            "is_encoder_decoder": False,
            "is_hybrid": False,
            "use_mla": False,
            "quantization": None,
            "architectures": ["LlamaForCausalLM"],
            "hf_text_config": SimpleNamespace(),
        },
        "parallel": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1},
        "cache": {"cache_dtype": "auto"},
        "compilation": {"mode": None},
    }
    whole = {"speculative": None, "lora": None, "kv_transfer": None}
    for name, value in changes.items():
        part, _, field = name.partition("_")
        if part in parts:
            parts[part][field] = value
        else:
            whole[name] = value
    held = {name: SimpleNamespace(**values) for name, values in parts.items()} | whole
    return SimpleNamespace(
        **{f"{name}_config": value for name, value in held.items()}, use_v2_model_runner=second_runner
    )


@dataclasses.dataclass
class Speculative:
    """Some of the fields of vLLM's SpeculativeConfig."""

    method: str = "ngram"
    rejection_sample_method: str = "standard"
    draft_sample_method: str = "greedy"
    parallel_drafting: bool = False
    num_speculative_tokens: int | None = None
    draft_model_config: object = None
    target_model_config: object = None


def images(architecture, encoder="idefics3_vision", **changes):
    """Changes for a model that takes images. mm_...: settings of its encoder."""
    media = {name: changes.pop(name) for name in list(changes) if name.startswith("mm_")}
    return {
        "model_is_multimodal_model": True,
        "model_architectures": [architecture],
        "model_enforce_eager": True,
        "model_multimodal_config": SimpleNamespace(**media),
        "model_hf_config": SimpleNamespace(vision_config=SimpleNamespace(model_type=encoder)),
        **changes,
    }


def ngram(**changes):
    return Speculative(**changes)


def draft(**model):
    return Speculative(method="eagle3", draft_model_config=SimpleNamespace(**model))


def check(platform, release=None, **changes):
    table.check(config(**changes), platform, Version(release or releases.BY_PLATFORM[platform][-1]))
