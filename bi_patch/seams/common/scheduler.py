"""Seams of scheduling: what the scheduler may choose by the batch must not reach a reduction."""

import functools

from bi_patch.seams.model import Policy, Seam, Target


def _no_cascade(original):
    """GPUModelRunner._compute_cascade_attn_prefix_lens: no shared prefix is ever attended apart."""

    @functools.wraps(original)
    def _compute_cascade_attn_prefix_lens(self, *args, **kwargs):
        return None

    return _compute_cascade_attn_prefix_lens


def _disable_cascade(config) -> None:
    if config.model_config is not None and hasattr(config.model_config, "disable_cascade_attn"):
        config.model_config.disable_cascade_attn = True


SEAMS = (
    Seam(
        name="scheduler.cascade",
        targets=(
            Target("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._compute_cascade_attn_prefix_lens", "<0.32"),
        ),
        close=_no_cascade,
        why="cascade attention splits KV at the prefix that the batch happens to share",
        how="reports no common prefix; releases from 0.32 on have no cascade attention",
        until="0.26 is no longer supported",
        causes=(5,),
    ),
)

POLICIES = (
    Policy(
        name="scheduler.cascade_flag",
        apply=_disable_cascade,
        why="cascade attention is chosen by the prefix that a batch shares",
    ),
)
