"""Quantized weights and KV caches on Ascend are refused: no route serves their products."""

from bi_patch.seams.ascend.common import refuse
from bi_patch.seams.model import Policy


def _quantized(config) -> None:
    model = config.model_config
    found = []
    if model is not None and model.quantization is not None:
        found.append(f"{model.quantization!r} weights")
    kv = getattr(config.cache_config, "cache_dtype", "auto")
    if kv not in ("auto", "bfloat16", "float16"):
        found.append(f"a {kv!r} KV cache")
    refuse("quantization.ascend", found, "Use unquantized weights and --kv-cache-dtype auto")


POLICIES = (Policy(name="quantization.ascend", apply=_quantized, why="no route serves quantized products"),)
