"""Which adapter a row of a language model's head has. Every platform shares this.

vLLM names an adapter for each token of a step and for each request. The head also gets rows of prompts, whose logprobs
a request asks for, and rows of drafts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from bi_patch.errors import UnsupportedFeature

_STEP = "_bi_patch_step"  # attribute of a PunicaWrapper: the hidden states that the head gets rows of, and which rows


@contextlib.contextmanager
def step(model: Any, hidden: Any, rows: Any = None) -> Iterator[None]:
    """Let the wrappers of a model's adapters know a step's hidden states [tokens, hidden size].

    rows: int64, the tokens whose logits are sampled from, in order, or None.
    """
    wrappers = set(model.lora_manager.punica_wrapper_mapping.values())
    try:
        for wrapper in wrappers:
            setattr(wrapper, _STEP, (hidden, rows))
        yield
    finally:
        for wrapper in wrappers:
            setattr(wrapper, _STEP, None)


def slots(wrapper: Any, x: Any, platform: str) -> Any:
    """The slots, int64 [rows], of the rows x [rows, hidden size] that a head gets; negative for none.

    Raises UnsupportedFeature for rows that nobody knows.
    """
    given = getattr(wrapper, _STEP, None)
    if given is None:
        found = wrapper.sampler_indices
    elif _is_part(x, given[0]):
        found = _of_tokens(wrapper, x, given[0])
    else:
        found = wrapper.token_lora_indices[given[1]] if given[1] is not None else None
    if found is None or x.shape[0] != found.shape[0]:
        raise UnsupportedFeature(
            f"lora.{platform}: the head gets {x.shape[0]} rows, and nobody knows which adapter a row has. Ask for no "
            "prompt logprobs, or set BI_PATCH=0"
        )
    return found


def refuse_head(layer: Any, kind: Any, platform: str) -> None:
    """Raise UnsupportedFeature if a head computes in another type than its adapters. layer: a LogitsProcessorWithLoRA.
    kind: the adapters' type. Requests of such adapters are refused before, by their files (seams/common/lora.py)."""
    if layer.base_layer.head_dtype not in (None, kind):
        raise UnsupportedFeature(
            f"lora.{platform}: bi_patch does not cover adapters of a head in {layer.base_layer.head_dtype}. Use a head "
            "of the model's type, or an adapter without it"
        )


def _is_part(x: Any, held: Any) -> bool:
    return x.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()


def _of_tokens(wrapper: Any, x: Any, held: Any) -> Any:
    """The slots of rows that are a part of a step's hidden states: its place tells the tokens."""
    first, inside = divmod(x.data_ptr() - held.data_ptr(), held.stride(0) * held.element_size())
    known = wrapper.token_lora_indices
    whole = x.stride() == held.stride() and not inside
    return known[first : first + x.shape[0]] if whole and 0 <= first <= first + x.shape[0] <= len(known) else None


def prompt_logprobs(original):
    """GPUModelRunner._get_prompt_logprobs_dict (model runner V1): tell the head that it gets the rows of a prompt."""

    @functools.wraps(original)
    def _get_prompt_logprobs_dict(self, hidden_states, *args, **kwargs):
        if self.lora_config is None or not self.num_prompt_logprobs:
            return original(self, hidden_states, *args, **kwargs)
        with step(self.model, hidden_states):
            return original(self, hidden_states, *args, **kwargs)

    return _get_prompt_logprobs_dict


def sample_tokens(original):
    """GPUModelRunner.sample_tokens (model runner V2): tell the head which rows it gets."""

    @functools.wraps(original)
    def sample_tokens(self, *args, **kwargs):
        held = self.execute_model_state
        if self.lora_config is None or held is None or held.hidden_states is None:
            return original(self, *args, **kwargs)
        with step(self.model, held.hidden_states, held.input_batch.logits_indices):
            return original(self, *args, **kwargs)

    return sample_tokens
