"""Each Ascend policy accepts a plain configuration and refuses by name what no seam covers."""

import copy
from types import SimpleNamespace as Config

import pytest
from packaging.version import Version

from bi_patch.arming.catalog import plan
from bi_patch.errors import UnsupportedFeature
from bi_patch.ops.ascend import machine
from bi_patch.platforms.releases import BY_PLATFORM

PLAN = plan(Version(BY_PLATFORM["ascend"][-1]), "ascend")


class Mode:
    """A fake of vLLM's CUDAGraphMode."""

    def __init__(self, name):
        self.name = name

    def __class_getitem__(cls, name):
        return cls(name)


@pytest.fixture
def config():
    return Config(
        model_config=Config(
            runner_type="generate",
            is_multimodal_model=False,
            is_encoder_decoder=False,
            is_hybrid=False,
            use_mla=False,
            quantization=None,
            disable_cascade_attn=False,
        ),
        parallel_config=Config(
            data_parallel_size=1,
            enable_expert_parallel=False,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            tensor_parallel_size=2,
            pipeline_parallel_size=1,
        ),
        scheduler_config=Config(enable_chunked_prefill=True, scheduler_cls=None),
        cache_config=Config(block_size=128, cache_dtype="auto", enable_prefix_caching=True),
        compilation_config=Config(
            cudagraph_mode=Mode("PIECEWISE"),
            pass_config=Config(enable_sp=False, fuse_gemm_comms=False, fuse_allreduce_rms=False),
        ),
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        additional_config={},
    )


def apply(config):
    for policy in PLAN.policies:
        policy.apply(config)


def changed(config, path, value):
    made = copy.deepcopy(config)
    *owners, last = path.split(".")
    owner = made
    for name in owners:
        owner = getattr(owner, name)
    setattr(owner, last, value)
    return made


def test_a_plain_configuration_passes_and_fusions_are_off(config):
    apply(config)
    assert config.additional_config["ascend_compilation_config"] == {
        "fuse_norm_quant": False,
        "fuse_qknorm_rope": False,
        "fuse_allreduce_rms": False,
        "fuse_muls_add": False,
    }
    apply(config)  # every process applies the policies, so a second time must change nothing


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model_config.use_mla", True, "MLA"),
        ("model_config.quantization", "ascend", "quantized weights .ascend"),
        ("cache_config.cache_dtype", "int8", "'int8' KV cache"),
        ("cache_config.block_size", 64, "--block-size 128"),
        ("speculative_config", object(), "speculative"),
        ("lora_config", object(), "LoRA"),
        ("parallel_config.enable_expert_parallel", True, "expert parallelism"),
        ("parallel_config.decode_context_parallel_size", 2, "context parallelism"),
        ("compilation_config.cudagraph_mode", Mode("FULL_DECODE_ONLY"), "FULL_DECODE_ONLY"),
        ("compilation_config.backend", "inductor", "the compiler backend inductor"),
        ("compilation_config.pass_config.enable_sp", True, "enable_sp"),
        (
            "scheduler_config.scheduler_cls",
            "vllm_ascend.core.scheduler_dynamic_batch.SchedulerDynamicBatch",
            "scheduler",
        ),
        ("additional_config", {"recompute_scheduler_enable": True}, "recompute_scheduler_enable"),
        (
            "additional_config",
            {"profiling_chunk_config": {"enabled": True}},
            "profiling_chunk_config.enabled",
        ),
        ("additional_config", {"enable_matmul_allreduce": True}, "enable_matmul_allreduce"),
        ("additional_config", {"weight_nz_mode": 1}, "weight_nz_mode"),
        ("additional_config", {"xlite_graph_config": {"enabled": True}}, "xlite_graph_config"),
    ],
)
def test_what_is_not_covered_is_refused(config, path, value, said):
    with pytest.raises(UnsupportedFeature, match=said):
        apply(changed(config, path, value))


def test_full_graphs_beside_piecewise_ones_are_left_out(config):
    made = changed(config, "compilation_config.cudagraph_mode", Mode("FULL_AND_PIECEWISE"))
    apply(made)
    assert made.compilation_config.cudagraph_mode.name == "PIECEWISE"


@pytest.mark.parametrize("off", ["scheduler_config.enable_chunked_prefill", "cache_config.enable_prefix_caching"])
def test_cut_prompts_are_refused_with_ascendc_attention(config, monkeypatch, off):
    monkeypatch.setattr(machine, "ascendc_installed", lambda: True)
    with pytest.raises(UnsupportedFeature, match="scheduler.ascend_chunks.*not shown"):
        apply(changed(config, off, False))


def test_hccl_is_strict():
    assert {(s.variable, s.value) for s in PLAN.variables} >= {
        ("HCCL_DETERMINISTIC", "strict"),
        ("LCCL_DETERMINISTIC", "1"),
    }
