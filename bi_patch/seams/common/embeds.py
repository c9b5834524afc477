"""Prompt embeddings: cached keys and values belong to the embeddings that they were computed from, and to no others."""

from bi_patch.seams.common.refused import bad_request


def check(config, request) -> None:
    """Raise UnsupportedRequest for prompt embeddings that would change or end other requests.

    config: the engine's VllmConfig. request: an EngineCoreRequest, whose prompt_embeds is a tensor [tokens, hidden] or
    None.

    An attention kernel multiplies the values of keys that a row does not see by zero, and zero times infinity is NaN.
    So a NaN at one position reaches earlier positions, and through the prefix cache the requests that share these. An
    embedding of another width ends the engine inside a step, and so does a token outside of the vocabulary.
    """
    held = request.prompt_embeds
    if held is None:
        return
    model = config.model_config
    width = model.get_inputs_embeds_size()
    if held.ndim != 2 or not len(held) or held.shape[1] != width or not held.is_floating_point():
        raise bad_request(
            f"embeds.check: prompt_embeds is a tensor of {held.dtype} and shape {list(held.shape)}. Give "
            f"floating-point numbers of shape [tokens, {width}]"
        )
    if not bool(held.to(model.dtype).isfinite().all()):
        raise bad_request(
            f"embeds.check: prompt_embeds holds a NaN or an infinity in {model.dtype}. Cached keys and values of "
            "positions before it would hold it, too, and other requests that begin alike would read them. Give finite "
            "embeddings"
        )
    tokens, mask = request.prompt_token_ids, request.prompt_is_token_ids
    size = model.get_vocab_size()
    if tokens and mask and not all(0 <= token < size for token, used in zip(tokens, mask, strict=False) if used):
        raise bad_request(
            f"embeds.check: a token beside prompt_embeds is not below the vocabulary's size, {size}. Give another one"
        )


def described(request, start: int, end: int) -> tuple[tuple[str, str], ...]:
    """What else the key of the block of positions [start, end) must hold, beside the bytes of its embeddings: their
    type, and which of its positions are tokens. Empty for a block without embeddings. request: vLLM's Request."""
    held = request.prompt_embeds
    if held is None or start >= len(held):
        return ()
    tokens = request.prompt_is_token_ids
    if tokens is None:
        mask = "embeddings" if request.prompt_token_ids is None else "embeddings beside tokens"
    else:
        mask = "".join("t" if token else "e" for token in tokens[start:end])
    return (("bi_patch_embeds", f"{held.dtype} {mask}"),)
