"""Scheduling on Ascend: chunks, cached prefixes and preemption need attention with one order for decode and prefill.

The bundled attention splits keys at fixed positions, so a row's bits do not depend on the chunks of its prompt. No test
showed that the AscendC operator gives decode the bits of prefill. If it is installed, bi_patch refuses all three.
"""

from bi_patch.seams.ascend.common import option, refuse
from bi_patch.seams.model import Policy, Seam, Target

_WHY = "AscendC attention was not shown to give a decoded row the bits of a prefilled row"


def _preempt(original):
    """Scheduler._preempt_request: refuse with AscendC, because vLLM would recompute decoded tokens as a prompt."""
    import functools

    @functools.wraps(original)
    def _preempt_request(self, *args, **kwargs):
        from bi_patch.ops.ascend import machine

        if machine.ascendc_installed():
            refuse(
                "scheduler.ascend_preemption",
                [f"preempting a request: vLLM would recompute its tokens as a prompt, and {_WHY}"],
                "Give the KV cache more memory, lower --max-num-seqs, or uninstall batch_invariant_ops",
            )
        return original(self, *args, **kwargs)

    return _preempt_request


def _cut_prompts(config) -> None:
    from bi_patch.ops.ascend import machine

    if not machine.ascendc_installed():
        return
    found = []
    if config.scheduler_config.enable_chunked_prefill:
        found.append("chunked prefill with AscendC attention (--no-enable-chunked-prefill)")
    if config.cache_config.enable_prefix_caching:
        found.append("prefix caching with AscendC attention (--no-enable-prefix-caching)")
    refuse("scheduler.ascend_chunks", found, f"Turn it off ({_WHY}), or uninstall batch_invariant_ops")


def _schedulers(config) -> None:
    found = [name for name in _OPTIONS if option(config, name) not in (None, False, -1)]
    chosen = getattr(config.scheduler_config, "scheduler_cls", None)
    if "vllm_ascend.core" in str(getattr(chosen, "__module__", chosen)):
        found.append(f"the scheduler {chosen}")
    refuse("scheduler.ascend_schedulers", found, "Use vLLM's own scheduler")


_OPTIONS = (
    "recompute_scheduler_enable",
    "enable_balance_scheduling",
    "SLO_limits_for_dynamic_batch",
    "profiling_chunk_config.enabled",
    "enable_async_exponential",
)

SEAMS = (
    Seam(
        name="scheduler.ascend_preemption",
        targets=(Target("vllm.v1.core.sched.scheduler", "Scheduler._preempt_request"),),
        close=_preempt,
        why="after a preemption, vLLM recomputes a request's decoded tokens as a prompt",
        how="with the bundled attention, whose order depends on positions only, preemption is allowed. With AscendC "
        "attention, bi_patch refuses it",
        until="a test shows that AscendC attention has one order for decode and prefill",
        causes=(9,),
    ),
)

POLICIES = (
    Policy(name="scheduler.ascend_chunks", apply=_cut_prompts, why=_WHY),
    Policy(
        name="scheduler.ascend_schedulers",
        apply=_schedulers,
        why="vLLM-Ascend's own schedulers (vllm_ascend/core) ignore the batch-invariant mode",
    ),
)
