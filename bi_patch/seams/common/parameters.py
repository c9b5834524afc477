"""The fields of vLLM's SamplingParams and PoolingParams that somebody has examined. A request that sets another one is
refused, also one that a later release brings."""

from __future__ import annotations

import functools
from typing import Any

EXAMINED = frozenset(
    {
        # What is drawn and when a request ends.
        *("n", "temperature", "top_p", "top_k", "min_p", "seed", "logit_bias", "allowed_token_ids", "bad_words"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "structured_outputs", "extra_args"),
        *("stop", "stop_token_ids", "ignore_eos", "min_tokens", "max_tokens", "repetition_detection"),
        *("thinking_token_budget", "skip_reading_prefix_cache"),
        "watermarking",  # of engines with watermarks, which have a row of their own
        # What is returned, and how.
        *("logprobs", "prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start", "logprob_token_ids"),
        *("flat_logprobs", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
        *("include_stop_str_in_output", "output_kind", "stream_interval", "output_text_buffer_length", "skip_clone"),
        "routed_experts_prompt_start",
        # Of pooling. `requests.check` refuses both of the last line.
        *("task", "use_activation", "dimensions", "step_tag_id", "returned_token_ids", "requires_token_ids"),
        "extra_kwargs",
        *("late_interaction_params", "late_chunking_params"),
    }
)


def unknown(params: Any) -> list[str]:
    """The fields of a request's parameters that nobody has examined, and whose value is not vLLM's default.

    vLLM's classes are Structs of msgspec. Of another class nobody knows the defaults: every other attribute is named.
    """
    import msgspec

    if not isinstance(params, msgspec.Struct):
        return [name for name in vars(params) if name not in EXAMINED and name[0] != "_"]
    found = []
    for name, usual in _unexamined(type(params)):  # for every request: no call for a field at its default
        value = getattr(params, name)
        if value is not usual and differs(value, usual):
            found.append(name)
    return found


def differs(value: Any, usual: Any) -> bool:
    """Whether two values of a field differ."""
    found = value != usual
    return bool(found.any() if hasattr(found, "any") else found)  # of an array, one for each element


@functools.cache
def _unexamined(kind: type) -> tuple[tuple[str, Any], ...]:
    """(name, default) of each field that nobody has examined. vLLM sets fields whose name begins with _ itself."""
    import msgspec

    found = [field for field in msgspec.structs.fields(kind) if field.name not in EXAMINED and field.name[0] != "_"]
    return tuple((field.name, _default(field)) for field in found)


def _default(field: Any) -> Any:
    import msgspec

    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
