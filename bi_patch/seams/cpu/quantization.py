"""Rules on quantized weights and KV caches: refused where no closed seam covers them."""

from collections.abc import Callable
from typing import Any

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Policy


def _refusing(name: str, device: str, caches: tuple[str, ...]) -> Callable[[Any], None]:
    """The rule of a platform: weights are not quantized, and the KV cache is of one of these dtypes."""

    def refuse(config) -> None:
        model = config.model_config
        if model is not None and model.quantization is not None:
            raise UnsupportedFeature(
                f"{name}: no seam covers {model.quantization!r} weights on {device}. "
                "Use unquantized weights, or set BI_PATCH=0"
            )
        kv = getattr(config.cache_config, "cache_dtype", "auto")
        if kv not in caches:
            raise UnsupportedFeature(
                f"{name}: no seam covers a {kv!r} KV cache on {device}. Use --kv-cache-dtype auto, or set BI_PATCH=0"
            )

    return refuse


POLICIES = (
    Policy(
        name="quantization.cpu",
        apply=_refusing("quantization.cpu", "CPU", ("auto", "bfloat16", "float16", "float32")),
        why="quantized linears and KV caches have no certified order on CPU",
    ),
)
