"""Seams of requests: what one asks for and no seam covers is refused by name, as a bad request."""

import functools

from bi_patch.errors import UnsupportedRequest
from bi_patch.seams.model import Seam, Target


def _checked(original):
    """InputProcessor._validate_params: refuse what would answer by what happens beside the request."""

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
    """What is not covered, and whether the parameters of a request (sampling or pooling) ask for it."""
    first_runner = not config.use_v2_model_runner
    prompt = getattr(params, "prompt_logprobs", None) is not None
    return {
        # After a preemption its state is made anew from the prompt alone.
        "thinking_token_budget with model runner V1": first_runner
        and getattr(params, "thinking_token_budget", None) is not None,
        # Positions from the cache have none: V1 gives what lay in memory, V2 fewer rows.
        "prompt_logprobs with skip_reading_prefix_cache=False": prompt
        and getattr(params, "skip_reading_prefix_cache", None) is False,
        "prompt_logprobs with --kv-sharing-fast-prefill": prompt
        and bool(getattr(config.cache_config, "kv_sharing_fast_prefill", False)),
    }


SEAMS = (
    Seam(
        name="requests.parameters",
        targets=(Target("vllm.v1.engine.input_processor", "InputProcessor._validate_params"),),
        close=_checked,
        why="a request may ask for what depends on preemption or on what the cache holds",
        how="refused by name as a bad request; other requests are served",
        until="upstream keeps a thinking budget's state over preemption and computes all prompt logprobs",
        causes=(8, 9),
    ),
)
