"""Seams of the engine itself: the configuration, worker start, model load, and vLLM's own invariant mode."""

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Policy


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


POLICIES = (
    Policy(
        name="engine.cuda_features",
        apply=_refuse_cuda_features,
        why="no closed seam covers them on CUDA yet",
    ),
)
