"""Scheduling: no choice that the scheduler makes for a batch may change a reduction."""

import functools

from bi_patch.seams import pooling as poolers
from bi_patch.seams.common import seeds
from bi_patch.seams.common.refused import bad_request
from bi_patch.seams.model import Policy, Seam, Target


def _no_cascade(original):
    """GPUModelRunner._compute_cascade_attn_prefix_lens: None, so that no layer uses cascade attention."""

    @functools.wraps(original)
    def _compute_cascade_attn_prefix_lens(self, *args, **kwargs):
        return None

    return _compute_cascade_attn_prefix_lens


def _reset(original):
    """Scheduler.reset_prefix_cache: forget offloaded keys and values, too. Whoever resets the cache changed weights.
    Refuse to preempt seeded requests whose next token may be drawn already."""

    @functools.wraps(original)
    def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False):
        if reset_running_requests:
            _refuse_lost_draws(self)
            _refuse_kept_rows(self)
        return original(self, reset_running_requests, reset_connector or self.connector is not None)

    return reset_prefix_cache


def _refuse_lost_draws(scheduler) -> None:
    """Raise UnsupportedRequest if a reset would drop tokens that a request's generator has drawn.

    With asynchronous scheduling, the reset drops the output of the step in flight. Model runner V1 keeps a generator
    for each seeded request, which has drawn that token and would then draw the next. V2 draws by position.
    """
    config = scheduler.vllm_config
    if config.use_v2_model_runner or not getattr(config.scheduler_config, "async_scheduling", False):
        return
    if any(seeds.samples(request.sampling_params) for request in scheduler.running):
        raise bad_request(
            "scheduler.reset_running: with asynchronous scheduling, a reset of running requests drops tokens that "
            "model runner V1 has drawn, so sampled requests would go on with other tokens. Reset the cache when no "
            "sampled request runs, start the engine without asynchronous scheduling, or with VLLM_USE_V2_MODEL_RUNNER=1"
        )


def _refuse_kept_rows(scheduler) -> None:
    """Raise UnsupportedRequest if a reset would pool rows twice: model runner V1 keeps a preempted request's rows."""
    if scheduler.vllm_config.use_v2_model_runner:
        return
    asked = (getattr(request, "pooling_params", None) for request in scheduler.running)
    if any(getattr(params, "task", None) in poolers.OF_TOKENS for params in asked):
        raise bad_request(
            "scheduler.reset_running: after a reset of running requests, model runner V1 returns vectors of some "
            "tokens twice. Reset the cache when no request for the vectors of all tokens runs"
        )


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
        why="cascade attention splits KV at the end of the prefix that all requests of the batch share",
        how="the model runner reports no common prefix. vLLM 0.32 and later releases have no cascade attention",
        until="bi_patch no longer supports vLLM 0.26",
        causes=(5,),
    ),
    Seam(
        name="scheduler.offloaded",
        targets=(Target("vllm.v1.core.sched.scheduler", "Scheduler.reset_prefix_cache"),),
        close=_reset,
        why="after new weights, a reset of the prefix cache leaves offloaded keys and values of the old weights",
        how="a reset of the prefix cache also resets the connector that holds offloaded keys and values. It is refused "
        "where it would drop tokens that a running request has drawn",
        until="upstream's reset_prefix_cache resets the connector by default",
        causes=(31,),
    ),
)

POLICIES = (
    Policy(
        name="scheduler.cascade_flag",
        apply=_disable_cascade,
        why="the prefix that the requests of a batch share decides whether vLLM uses cascade attention",
    ),
)
