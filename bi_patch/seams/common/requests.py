"""Requests: refuse by name, as a bad request, an option that no seam covers."""

import functools

from bi_patch.errors import UnsupportedRequest
from bi_patch.seams.model import Seam, Target


def _checked(original):
    """InputProcessor._validate_params: refuse options whose answer depends on what else the engine does."""

    @functools.wraps(original)
    def _validate_params(self, params, *args, **kwargs):
        found = [name for name, asked in _uncovered(self.vllm_config, params).items() if asked]
        if found:
            raise UnsupportedRequest(
                f"requests.parameters: batch invariance does not cover {'; nor '.join(found)}. Leave it out, or start "
                "the engine with BI_PATCH=0"
            )
        return original(self, params, *args, **kwargs)

    return _validate_params


def _uncovered(config, params) -> dict[str, bool]:
    """Each option that bi_patch does not cover, and whether a request's sampling or pooling parameters use it."""
    first_runner = not config.use_v2_model_runner
    prompt = getattr(params, "prompt_logprobs", None) is not None
    return {
        # After a preemption, vLLM makes the state of the budget anew from the prompt alone.
        "thinking_token_budget with model runner V1": first_runner
        and getattr(params, "thinking_token_budget", None) is not None,
        # Cached positions have no logprobs: V1 returns stale memory for these positions, V2 leaves their rows out.
        "prompt_logprobs with skip_reading_prefix_cache=False": (
            prompt or getattr(params, "prompt_logprob_token_ids", None) is not None
        )
        and getattr(params, "skip_reading_prefix_cache", None) is False,
        "prompt_logprobs with --kv-sharing-fast-prefill": prompt
        and bool(getattr(config.cache_config, "kv_sharing_fast_prefill", False)),
    }


SEAMS = (
    Seam(
        name="requests.parameters",
        targets=(Target("vllm.v1.engine.input_processor", "InputProcessor._validate_params"),),
        close=_checked,
        why="the answer to some request options depends on preemptions or on the contents of the prefix cache",
        how="bi_patch refuses such a request by name as a bad request, and serves other requests",
        until="upstream keeps the state of a thinking budget over a preemption, and computes all prompt logprobs "
        "(https://github.com/vllm-project/vllm/issues/42019)",
        causes=(8, 9),
    ),
)
