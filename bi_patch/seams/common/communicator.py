"""BI_PATCH_TP_INVARIANT serves dense decoders on CPU and CUDA (seams/<platform>/leaves.py). The rest is refused."""

from typing import Any

from packaging.version import Version

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import active
from bi_patch.seams.model import Policy

_FIRST = Version("0.33")  # on CUDA, nobody measured a release before
_RANKS, _EAGER_RANKS = 4, 2  # nor more ranks: compiled, and in eager mode
_TYPES = ("torch.bfloat16", "torch.float16")
_CACHES = ("auto", "bfloat16", "float16")


def _refuse(config: Any) -> None:
    if not active.leaves or config.model_config is None:
        return
    found = [name for name, there in _uncovered(config).items() if there]
    if found:
        raise UnsupportedFeature(
            f"communicator.leaves: BI_PATCH_TP_INVARIANT={active.leaves} does not cover {', '.join(found)}. Leave "
            "BI_PATCH_TP_INVARIANT out, and compare only engines with the same number of ranks"
        )


def _uncovered(config: Any) -> dict[str, bool]:
    model, parallel = config.model_config, config.parallel_config
    platform, release = active.plan.platform, active.plan.release
    cache = str(config.cache_config.cache_dtype)
    return {
        f"the platform {platform}": platform not in ("cpu", "cuda"),
        f"vLLM {release} on CUDA": platform == "cuda" and release < _FIRST,
        f"weights of {model.dtype} on CUDA": platform == "cuda" and str(model.dtype) not in _TYPES,
        f"a {cache!r} KV cache on CUDA": platform == "cuda" and cache not in _CACHES,
        "data parallelism on CUDA": platform == "cuda" and parallel.data_parallel_size > 1,
        f"{parallel.tensor_parallel_size} ranks on CUDA": platform == "cuda" and parallel.tensor_parallel_size > _RANKS,
        f"{parallel.tensor_parallel_size} ranks on CUDA in eager mode": platform == "cuda"
        and model.enforce_eager
        and parallel.tensor_parallel_size > _EAGER_RANKS,
        f"{parallel.tensor_parallel_size} ranks": active.leaves % parallel.tensor_parallel_size != 0,
        "pipeline parallelism on CUDA": platform == "cuda" and parallel.pipeline_parallel_size > 1,
        "experts": bool(getattr(model, "is_moe", False)),
        "MLA": bool(getattr(model, "use_mla", False)),
        "recurrent layers": bool(getattr(model, "is_hybrid", False) or getattr(model, "is_attention_free", False)),
        "quantized weights": model.quantization is not None,
        "pooling": model.runner_type != "generate",
        "images, sound or video": bool(model.is_multimodal_model),
        "encoder-decoder models": bool(model.is_encoder_decoder),
        "LoRA": config.lora_config is not None,
        "speculative decoding": config.speculative_config is not None,
    }


POLICIES = (
    Policy(
        name="communicator.leaves",
        apply=_refuse,
        why="equal bits for all tensor-parallel sizes need every sum over K that ranks share to have fixed parts",
    ),
)
