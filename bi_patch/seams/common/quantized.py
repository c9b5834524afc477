"""The scales of a checkpoint are checked before any layer packs its weights."""

import functools

from bi_patch.seams import scales
from bi_patch.seams.model import Seam, Target


def _checked(original):
    """process_weights_after_loading of a model: look at the scales that were loaded. Dummy weights are no checkpoint:
    vLLM leaves in them what was in memory."""

    @functools.wraps(original)
    def process_weights_after_loading(model, *args, **kwargs):
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        if config is None or config.load_config.load_format != "dummy":
            scales.check(model)
        return original(model, *args, **kwargs)

    return process_weights_after_loading


_LOADER = "vllm.model_executor.model_loader"

SEAMS = (
    Seam(
        name="quantized.scales",
        targets=(
            Target(
                f"{_LOADER}.utils",
                "process_weights_after_loading",
                ">=0.32",
                (f"{_LOADER}.base_loader", f"{_LOADER}.weight_cache.daemon", f"{_LOADER}.weight_cache.ipc_loader"),
            ),
        ),
        close=_checked,
        why="a scale that is a NaN or an infinity reaches kernels and certificates, which cannot name its tensor",
        how="such a scale is refused with the name of its tensor",
        until="vLLM refuses such scales",
    ),
)
