"""Options of vLLM's configuration: one that nobody has examined is refused, also one that a later release brings."""

import dataclasses
import importlib
import pkgutil
from types import SimpleNamespace

import pytest

from bi_patch.platforms.features import configs, engine

# Fields of vLLM 0.23 to 0.33 that are refused unless they have their default. A new field belongs into KNOWN once
# somebody has examined it, or into this list.
REFUSED = {
    "AttentionConfig.backend_per_kind",
    "AttentionConfig.mla_prefill_backend",
    "AttentionConfig.use_prefill_decode_attention",
    "CacheConfig.calculate_kv_scales",
    "CacheConfig.enable_mamba_shared_prefix_checkpoint",
    "CacheConfig.kv_cache_dtype_skip_layers",
    "CacheConfig.prefix_match_unit",
    "CacheConfig.swa_bounded_replay",
    "CompilationConfig.cudagraph_copy_inputs",
    "CompilationConfig.cudagraph_decoder_replay",
    "CompilationConfig.decoder_replay_cudagraph_capture_sizes",
    "CompilationConfig.decoder_replay_trim_threshold",
    "CompilationConfig.use_inductor_graph_partition",
    "DynamicShapesConfig.assume_32_bit_indexing",
    "DynamicShapesConfig.evaluate_guards",
    "DynamicShapesConfig.type",
    "HiSparseConfig.device_buffer_size",
    "HiSparseConfig.eager_host_mirror",
    "KVTransferConfig.enable_permute_local_kv",
    "KVTransferConfig.kv_load_failure_policy",
    "KernelConfig.enable_bf16x3_router_gemm",
    "KernelConfig.enable_rocm_segmented_attn_autotune",
    "KernelConfig.monokernel",
    "KernelConfig.sparse_indexer_topk_backend",
    "LoRAConfig.max_lora_cls_labels",
    "MambaConfig.backend",
    "MambaConfig.enable_stochastic_rounding",
    "MambaConfig.ssu_algorithm",
    "MambaConfig.stochastic_rounding_philox_rounds",
    "ModelConfig.enable_nccl_comm_suspend",
    "ModelConfig.enable_trace_replay",
    "ModelConfig.model_class_overrides",
    "ModelConfig.override_attention_dtype",
    "ModelConfig.return_sampling_mask",
    "ModelConfig.sleep_mode_backend",
    "ModelConfig.sleep_mode_offload_cudagraph",
    "ModelConfig.sleep_preserve_parameter_names",
    "ModelConfig.use_fp64_gumbel",
    "MultiModalConfig.allow_missing_mm_embeddings",
    "PassConfig.enable_qk_norm_rope_fusion",
    "PassConfig.fi_allreduce_fusion_max_size_mb",
    "PassConfig.fuse_act_padding",
    "PassConfig.fuse_mla_dual_rms_norm",
    "PassConfig.fuse_qk_norm_rope_kvcache",
    "PassConfig.fuse_rope_kvcache",
    "PassConfig.rope_kvcache_fusion_max_token_num",
    "PoolerConfig.enable_chunked_processing",
    "PoolerConfig.max_embed_len",
    "VllmConfig.engram_config",
}


# Classes with lists elsewhere, classes that act only beside a refused feature, and classes that no VllmConfig holds.
APART = {
    *("ParallelConfig", "EPLBConfig", "FaultToleranceConfig", "SpeculativeConfig", "WatermarkConfig", "EngramConfig"),
    *("ModelArchitectureConfig", "SpeechToTextConfig", "SpeechToTextParams", "Range"),
    *("BaseDummyOptions", "AudioDummyOptions", "ImageDummyOptions", "VideoDummyOptions"),
}


def _classes(package):
    """The dataclasses of a package's modules, by their names."""
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    kinds = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    own = [k for k in kinds if dataclasses.is_dataclass(k) and k.__module__.startswith(package.__name__)]
    return {kind.__name__: kind for kind in own}


def test_every_field_of_the_installed_release_is_known_or_refused():
    classes = _classes(pytest.importorskip("vllm.config"))
    found = {
        f"{name}.{field.name}"
        for name, kind in classes.items()
        for field in dataclasses.fields(kind)
        if name not in APART and field.name not in configs.KNOWN.get(name, ())
    }
    assert len(classes) > 30 and found - REFUSED == set()


def test_no_field_is_both_known_and_refused():
    known = {f"{kind}.{name}" for kind, names in configs.KNOWN.items() for name in names}
    assert not known & REFUSED


@dataclasses.dataclass
class SchedulerConfig:
    """A SchedulerConfig of a later release."""

    max_num_seqs: int = 128
    sum_by_arrival: bool = False
    switch: bool | None = None
    sizes: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Own(SchedulerConfig):
    """A platform's own scheduler configuration."""

    weights_by_load: int = 0


@dataclasses.dataclass
class PassConfig:
    fuse_by_rows: bool = False


@dataclasses.dataclass
class CompilationConfig:
    pass_config: PassConfig = dataclasses.field(default_factory=PassConfig)


@dataclasses.dataclass
class ReductionConfig:
    """A new class of a later release."""

    order: str = "ascending"


ReductionConfig.__module__ = "vllm.config.reduction"


@dataclasses.dataclass
class LoadConfig:
    model_loader_extra_config: object = None


@dataclasses.dataclass
class ParallelConfig:
    its_own_row: bool = True


@dataclasses.dataclass
class VllmConfig:
    scheduler_config: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    compilation_config: CompilationConfig = dataclasses.field(default_factory=CompilationConfig)
    load_config: LoadConfig = dataclasses.field(default_factory=LoadConfig)
    parallel_config: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    reduction_config: ReductionConfig = dataclasses.field(default_factory=ReductionConfig)


def test_an_unknown_field_is_refused_unless_it_has_its_default():
    assert configs.unknown(VllmConfig()) == []
    given = SchedulerConfig(max_num_seqs=2, sum_by_arrival=True, switch=True, sizes=[2])
    found = ["SchedulerConfig.sizes", "SchedulerConfig.sum_by_arrival", "SchedulerConfig.switch"]
    assert configs.unknown(VllmConfig(scheduler_config=given)) == found
    assert configs.unknown(VllmConfig(scheduler_config=SchedulerConfig(switch=False))) == []


def test_options_inside_of_options_are_found():
    given = VllmConfig(compilation_config=CompilationConfig(PassConfig(fuse_by_rows=True)))
    assert configs.unknown(given) == ["PassConfig.fuse_by_rows"]


def test_a_new_class_is_refused_where_it_stands():
    assert configs.unknown(VllmConfig(reduction_config=ReductionConfig("by load"))) == ["VllmConfig.reduction_config"]
    given = VllmConfig(load_config=LoadConfig(ReductionConfig("by load")))
    assert configs.unknown(given) == ["ReductionConfig.order"]


def test_a_platforms_own_class_knows_the_fields_of_vllms():
    assert configs.unknown(VllmConfig(scheduler_config=_Own(max_num_seqs=2))) == []
    assert configs.unknown(VllmConfig(scheduler_config=_Own(weights_by_load=1))) == ["_Own.weights_by_load"]


def test_lists_that_live_elsewhere_are_left_to_them():
    assert configs.unknown(VllmConfig(parallel_config=ParallelConfig(its_own_row=False))) == []


def test_the_table_refuses_it():
    row = next(row for row in engine.FEATURES if row.name.startswith("every other option of vLLM's configuration"))
    assert (
        row.asked(VllmConfig(scheduler_config=SchedulerConfig(sum_by_arrival=True))) == "SchedulerConfig.sum_by_arrival"
    )
    assert row.asked(SimpleNamespace()) == ""
    assert all(cell.state == "refused" for cells in row.cells.values() for cell in cells)
