"""Faults of MLA on CUDA, planted where prompts and generated tokens have forms of their own (BI_PATCH_MLA=two)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bi_patch.errors import BiPatchError
from bi_patch.tools.verify.engine import LocalEngine


@contextlib.contextmanager
def _instead(owner, name: str, made) -> Iterator[None]:
    """Within this context, `owner.name` is `made`."""
    held = vars(owner)[name]
    setattr(owner, name, made)
    try:
        yield
    finally:
        setattr(owner, name, held)


def _two_forms() -> None:
    from bi_patch.seams.cuda import mla_steps

    if not mla_steps.two_forms():
        raise BiPatchError("faults of MLA are planted in its two forms: set BI_PATCH_MLA=two")


def splits(engine: LocalEngine):
    """FlashAttention chooses the number of parts of a generated token's latents by the batch."""
    from bi_patch.seams.cuda import mla_rows

    _two_forms()
    return _instead(mla_rows.Rows, "schedule", mla_rows.Rows.theirs)


@contextlib.contextmanager
def context_apart(engine: LocalEngine) -> Iterator[None]:
    """A chunk attends to its context and to itself separately, and the two are merged at the scheduler's cut, by
    vLLM's own code."""
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention, MLACommonMetadataBuilder

    _two_forms()
    built, ours = MLACommonMetadataBuilder.build.__wrapped__, MLAAttention.forward_impl
    theirs = ours.__wrapped__

    def forward_impl(self, q, k_c_normed, k_pe, kv_cache, attn_metadata, output, *args, **kwargs):
        by = ours if getattr(attn_metadata, "prefill", None) is None else theirs
        return by(self, q, k_c_normed, k_pe, kv_cache, attn_metadata, output, *args, **kwargs)

    with _instead(MLACommonMetadataBuilder, "build", built), _instead(MLAAttention, "forward_impl", forward_impl):
        yield


def other_form(engine: LocalEngine):
    """The number of a request's new tokens in a step chooses the form: several take the form with up-projected keys and
    values, also when generated tokens are computed again; single tokens take the absorbed form."""
    from bi_patch.seams.cuda import mla_steps

    _two_forms()
    divide = mla_steps.divide
    return _instead(mla_steps, "divide", lambda common, prompts: divide(common, None))
