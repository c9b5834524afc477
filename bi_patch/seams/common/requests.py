"""Requests: refuse by name, as a bad request, an option that no seam covers.

The front end checks first, so that a server answers with the status of a bad request. The engine core checks every
request again, since clients other than vLLM's Python front end send requests to it as well.
"""

import functools

from bi_patch.platforms import releases
from bi_patch.seams import active
from bi_patch.seams import pooling as poolers
from bi_patch.seams.common import arriving, embeds, lora, parameters, seeds, streamed
from bi_patch.seams.common.refused import bad_request
from bi_patch.seams.model import Seam, Target

# Releases whose scheduler does not take back what it planned, asynchronously, behind a part of a streamed input.
_COUNTS_LATE = "<0.32"


def check(config, params) -> None:
    """Raise UnsupportedRequest for options whose answer depends on what else the engine does.

    config: the engine's VllmConfig. params: SamplingParams or PoolingParams.
    """
    found = [name for name, asked in _uncovered(config, params).items() if asked]
    found += [f"{name}, which nobody has examined" for name in parameters.unknown(params)]
    if found:
        raise bad_request(
            f"requests.parameters: batch invariance does not cover {'; nor '.join(found)}. Leave it out, or start "
            "the engine with BI_PATCH=0"
        )
    found = _too_long(params) if config.use_v2_model_runner else []
    if found:
        raise bad_request(
            f"requests.parameters: the request has {'; and '.join(found)}. An error inside a step would end the engine "
            "and all requests. Give fewer, or start the engine with VLLM_USE_V2_MODEL_RUNNER=0"
        )
    found = [name for name, asked in _wrong_seed(params).items() if asked]
    if found:
        raise bad_request(f"requests.parameters: the request has {'; and '.join(found)}. Give it another seed")
    if seeds.lacks_seed(params) and active.unseeded == "refuse":
        raise bad_request(
            "requests.parameters: the request samples without a seed, and BI_PATCH_UNSEEDED=refuse. Give it a seed, or "
            "temperature 0"
        )


def _uncovered(config, params) -> dict[str, bool]:
    """Each option that bi_patch does not cover, and whether a request's sampling or pooling parameters use it."""
    first_runner = not config.use_v2_model_runner
    cached = getattr(params, "skip_reading_prefix_cache", None) is False
    prompt = getattr(params, "prompt_logprobs", None) is not None
    scored = getattr(params, "prompt_logprob_token_ids", None) is not None
    drafts = getattr(config, "speculative_config", None) is not None
    fast = bool(getattr(config.cache_config, "kv_sharing_fast_prefill", False))
    return {
        # After a preemption, vLLM makes the state of the budget anew from the prompt alone.
        "thinking_token_budget with model runner V1": first_runner
        and getattr(params, "thinking_token_budget", None) is not None,
        # Cached positions have no logprobs: V1 returns stale memory for these positions, V2 leaves their rows out.
        "prompt_logprobs with skip_reading_prefix_cache=False": prompt and cached,
        "prompt_logprob_token_ids with skip_reading_prefix_cache=False": scored and cached,
        "prompt_logprobs with --kv-sharing-fast-prefill": prompt and fast,
        # Cached tokens have no vectors, and others decide what is cached.
        "vectors of all tokens with skip_reading_prefix_cache=False": cached
        and getattr(params, "task", None) in poolers.OF_TOKENS,
        # vLLM's Python front end refuses both, and the engine core would leave them out.
        "min_p with speculative decoding": drafts and (getattr(params, "min_p", 0.0) or 0.0) > 0,
        "logit_bias with speculative decoding": drafts and bool(getattr(params, "logit_bias", None)),
        # Model runner V2 leaves them out of a step with drafts.
        "logprob_token_ids with speculative decoding and model runner V2": drafts
        and not first_runner
        and bool(getattr(params, "logprob_token_ids", None)),
        "thinking_token_budget with speculative decoding": drafts
        and getattr(params, "thinking_token_budget", None) is not None,
        # vLLM pads the pairs of a step to the longest, and multiplies them together.
        "late interaction (MaxSim scores of the vectors of all tokens)": getattr(
            params, "late_interaction_params", None
        )
        is not None,
        "late chunking": getattr(params, "late_chunking_params", None) is not None,
    }


# How much room the tables of model runner V2 have for a request (logit_bias.py and logprob.py in
# vllm/v1/worker/gpu/sample). `_bad_words` knows the room for bad words.
ROOM = {"allowed_token_ids": 1024, "logit_bias": 1024, "all_stop_token_ids": 128, "logprob_token_ids": 128}


def _too_long(params) -> list[str]:
    """What of a request's parameters has no room in the tables of model runner V2."""
    found = []
    for name, room in ROOM.items():
        count = len(getattr(params, name, None) or ())
        stops = name == "all_stop_token_ids"  # in a table only until the request has min_tokens
        if count > room and (not stops or (params.min_tokens or 0) > 0):
            found.append(f"{count} {name}{' with min_tokens' * stops}, more than {room}")
    return found + _bad_words(getattr(params, "bad_words_token_ids", None) or ())


def _bad_words(words) -> list[str]:
    """What has no room in the table of bad words. words: token ids of each bad word. vLLM makes them in its front end
    after the check there, so the engine core's check sees them."""
    if not words:
        return []
    from vllm import envs

    # The releases without these settings have their usual values as constants.
    room = getattr(envs, "VLLM_MAX_NUM_BAD_WORDS", 128)
    room_of_tokens = getattr(envs, "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS", 1024)
    tokens = sum(map(len, words))
    found = [f"{len(words)} bad words, more than {room}"] if len(words) > room else []
    return found + ([f"{tokens} tokens of bad words, more than {room_of_tokens}"] if tokens > room_of_tokens else [])


def _wrong_seed(params) -> dict[str, bool]:
    """Each fault of a request's seed, and whether its parameters have the fault."""
    seed = getattr(params, "seed", None)
    if seed is None:
        return {}
    last = seed + (params.n or 1) - 1  # answer i of a request has the seed `seed + i`
    return {
        # Such a seed does not fit into the worker's tensor, which would stop the whole engine.
        "a seed of more than 64 bits": not -(2**63) <= seed <= last < 2**63,
        "a range of n seeds that holds -1, which vLLM reads as no seed": seed <= -1 <= last,
    }


def _checked(original):
    """InputProcessor._validate_params: refuse a request in the front end."""

    @functools.wraps(original)
    def _validate_params(self, params, *args, **kwargs):
        check(self.vllm_config, params)
        return original(self, params, *args, **kwargs)

    return _validate_params


def _checked_in_core(original):
    """EngineCore.preprocess_add_request: refuse a request in the engine core before any work on it starts, and give it
    its seed."""

    @functools.wraps(original)
    def preprocess_add_request(self, request, *args, **kwargs):
        if request.abort_immediately:  # such a request only frees what another engine holds for it
            return original(self, request, *args, **kwargs)
        try:
            check(self.vllm_config, request.params)
            lora.check(self, request.lora_request)
            embeds.check(self.vllm_config, request)
            _refuse_growing(self.vllm_config, request)
            if request.resumable:
                streamed.check_core(self.scheduler, request)
                earlier = arriving.latest(self, request.request_id)
                streamed.check(getattr(earlier, "sampling_params", None), request.sampling_params)
            _clear_signs(request.params)
            seed = seeds.source(self, request)
        except Exception:
            _keep_in_step(self, request)
            raise
        added = original(self, request, *args, **kwargs)
        if seed is not None:
            seeds.give(added[0], seed())
        if request.resumable or request.lora_request is not None:  # what a check looks for
            arriving.note(self, added[0])
        return added

    return preprocess_add_request


def _forgotten(original):
    """LLMEngine.add_request: the front end forgets a request that did not reach its engine core, or that a core in its
    process refused. It would wait for the answer for ever."""

    @functools.wraps(original)
    def add_request(self, request_id, *args, **kwargs):
        known = set(self.output_processor.request_states)
        try:
            return original(self, request_id, *args, **kwargs)
        except Exception:
            # Those of this call alone: a running request may have the same name.
            self.abort_request([added for added in self.output_processor.request_states if added not in known], True)
            raise

    return add_request


def _forgotten_async(original):
    """AsyncLLM._add_request: the same for vLLM's asynchronous front end, and for a caller that stops waiting for it."""

    @functools.wraps(original)
    async def _add_request(self, request, prompt, parent_req, *args, **kwargs):
        known = request.request_id in self.output_processor.request_states
        try:
            return await original(self, request, prompt, parent_req, *args, **kwargs)
        except BaseException:
            # The front end itself ends a request with streamed input, after the caller has got the error.
            if not (known or request.resumable):
                await self.abort((parent_req or request).request_id, internal=True)
            raise

    return _add_request


def _may_keep_dropped(config) -> bool:
    """Whether the scheduler counts a step that it planned before a part of a streamed input stopped."""
    late = active.plan is not None and releases.holds(_COUNTS_LATE, active.plan.release)
    return late and bool(getattr(config.scheduler_config, "async_scheduling", False))


def _refuse_growing(config, request) -> None:
    """Raise UnsupportedRequest for a request whose prompt takes in its generated tokens, where MLA has two forms, where
    drafts may be among the tokens, or where the scheduler's timing decides about the last token."""
    if not request.resumable:
        return
    if getattr(config, "speculative_config", None) is not None:
        # Where a stop drops accepted drafts, vLLM counts their keys and values as those of the next part's tokens.
        raise bad_request(
            "requests.core: the request streams its input, and speculative decoding may leave keys and values of "
            "dropped tokens in its cache. Send the whole prompt, or start the engine without speculative decoding"
        )
    if _may_keep_dropped(config):
        raise bad_request(
            "requests.core: the request streams its input, and with asynchronous scheduling this vLLM keeps the last "
            "token of a part only if its next step was not scheduled yet. Send the whole prompt, or start the engine "
            "with --no-async-scheduling"
        )
    two = active.mla == "two" and active.plan is not None and active.plan.platform == "cuda"
    if two and getattr(config.model_config, "use_mla", False):
        raise bad_request(
            "mla.cuda_forms: the request streams its input, so tokens that MLA computed as generated would become part "
            "of the prompt. Send the whole prompt, or start the engine with BI_PATCH_MLA=one"
        )


def _clear_signs(params) -> None:
    """Make penalties of -0.0 plain zeros. vLLM counts both as no penalty, but once another request of the step has a
    penalty, model runner V1 subtracts each row's own: a logit of -0.0 minus -0.0 is 0.0."""
    for name in ("frequency_penalty", "presence_penalty"):
        if getattr(params, name, None) == 0:
            setattr(params, name, 0.0)


def _keep_in_step(core, request) -> None:
    """Put the inputs of a refused request into the core's multimodal cache: the front end counts on them there."""
    if core.mm_receiver_cache is not None and request.mm_features:
        core.mm_receiver_cache.get_and_update_features(request.mm_features)


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
    Seam(
        name="requests.core",
        targets=(Target("vllm.v1.engine.core", "EngineCore.preprocess_add_request"),),
        close=_checked_in_core,
        why="vLLM checks requests in its Python front end only. The Rust front end and other clients send requests to "
        "the engine core directly",
        how="the engine core makes the same check. A refused request is answered with an error, and other requests go "
        "on. A sampled request without a seed gets its seed here if the front end gave it none",
        until="upstream validates requests in the engine core",
        causes=(8, 9, 29),
    ),
    Seam(
        name="requests.local",
        targets=(Target("vllm.v1.engine.llm_engine", "LLMEngine.add_request"),),
        close=_forgotten,
        why="a request that cannot be sent to the engine core (extra_args that nothing serializes) stays in the front "
        "end, whose next call never returns. So does one that a core without a process of its own refuses "
        "(VLLM_ENABLE_V1_MULTIPROCESSING=0)",
        how="the front end forgets the request, and the caller gets the error",
        until="upstream takes back a request that its engine core did not take",
        causes=(8, 9, 34),
    ),
    Seam(
        name="requests.sent",
        targets=(Target("vllm.v1.engine.async_llm", "AsyncLLM._add_request"),),
        close=_forgotten_async,
        why="a request that cannot be sent to the engine core stays in vLLM's asynchronous front end for ever, and "
        "counts as waiting there",
        how="the front end forgets the request and the other answers of its n, and the caller gets the error",
        until="upstream takes back a request that its engine core did not take",
        causes=(8, 9, 34),
    ),
)
