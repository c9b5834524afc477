"""Rules on quantized weights and KV caches: refused where no closed seam covers them."""

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import CPU, CUDA, Policy


def _refuse_cpu(config) -> None:
    model = config.model_config
    if model is not None and model.quantization is not None:
        raise UnsupportedFeature(
            f"quantization.cpu: no seam covers {model.quantization!r} weights on CPU. "
            "Use unquantized weights, or set BI_PATCH=0"
        )
    kv = getattr(config.cache_config, "cache_dtype", "auto")
    if kv not in ("auto", "bfloat16", "float16", "float32"):
        raise UnsupportedFeature(
            f"quantization.cpu: no seam covers a {kv!r} KV cache on CPU. Use --kv-cache-dtype auto, or set BI_PATCH=0"
        )


def _refuse_cuda(config) -> None:
    model = config.model_config
    if model is not None and model.quantization is not None:
        raise UnsupportedFeature(
            f"quantization.cuda: {model.quantization!r} weights were not shown to be invariant on CUDA. "
            "Use unquantized weights, or set BI_PATCH=0"
        )
    kv = getattr(config.cache_config, "cache_dtype", "auto")
    if kv not in ("auto", "bfloat16", "float16"):
        raise UnsupportedFeature(
            f"quantization.cuda: a {kv!r} KV cache was not shown to be invariant on CUDA. "
            "Use --kv-cache-dtype auto, or set BI_PATCH=0"
        )


POLICIES = (
    Policy(
        name="quantization.cuda",
        apply=_refuse_cuda,
        why="quantized linears, experts and KV caches have no certified order on CUDA",
        platforms=CUDA,
    ),
    Policy(
        name="quantization.cpu",
        apply=_refuse_cpu,
        why="quantized linears and KV caches have no certified order on CPU",
        platforms=CPU,
    ),
)
