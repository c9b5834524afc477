"""Streamed inputs: each part of an input is answered as a request of its own, with all tokens before it as its prompt.

vLLM's worker and scheduler read a part's parameters anew, except for its seed on model runner V1. The front end and
the grammar keep those of the first part.
"""

import functools
from typing import Any

from bi_patch.seams.common import parameters
from bi_patch.seams.common.refused import bad_request
from bi_patch.seams.model import Seam, Target

# What the scheduler and the worker read anew for each part.
OF_PARTS = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "seed", "logit_bias", "allowed_token_ids", "bad_words"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty"),
        *("stop_token_ids", "ignore_eos", "min_tokens", "max_tokens", "repetition_detection"),
        "skip_clone",
    }
)
_ENDED = "_bi_patch_ended"  # attribute of vLLM's RequestOutputCollector
_ABORTED = "_bi_patch_aborted"  # attribute of vLLM's Scheduler: ids of streamed inputs, the latest last
_MOST = 10_000  # ids
_FORGOT = (
    "streamed.ended: the engine ended this streamed input, by an abort or an error, and forgot the parts before this "
    "one. Send all of them again, as a new request"
)
_PARAMS = "_bi_patch_parts"  # attribute of vLLM's RequestState: the parameters of the request's latest part


def check(before: Any, params: Any) -> None:
    """Raise UnsupportedRequest if a part of a streamed input has parameters that vLLM reads from the first part.

    before: SamplingParams of an earlier part. params: those of the part. Other classes, and None, pass.

    vLLM's front end ends all requests if a part returns logprobs and the first did not. A part that asks for fewer
    gets as many as the step computes for others.
    """
    import msgspec

    if not isinstance(before, msgspec.Struct) or type(before) is not type(params):
        return
    fields = [field.name for field in msgspec.structs.fields(type(params))]
    names = [name for name in fields if name[0] != "_" and name not in OF_PARTS]
    found = [name for name in names if parameters.differs(getattr(before, name), getattr(params, name))]
    if found:
        raise bad_request(
            f"streamed.parts: a part of a streamed input has another value of {', '.join(found)} than the parts before "
            "it, and vLLM keeps that of the first part. Give all parts the same value"
        )


def check_front(states: dict, request: Any, queue: Any = None) -> None:
    """As `check`, in the front end, before a part goes to the engine core. Raise UnsupportedRequest also for a part of
    a streamed input that has ended (see `end`): the engine core would take the part for the first of another one.

    states: OutputProcessor.request_states. request: an EngineCoreRequest. queue: vLLM's RequestOutputCollector, one for
    all parts, or None.
    """
    if getattr(queue, _ENDED, False):
        raise bad_request(_FORGOT)
    if request.resumable:
        check(getattr(states.get(request.request_id), _PARAMS, None), request.sampling_params)


def check_core(scheduler: Any, request: Any) -> None:
    """Raise UnsupportedRequest, in the engine core, for a part of a streamed input that a pause aborted. scheduler:
    vLLM's. request: an EngineCoreRequest."""
    if ended(scheduler, request):
        raise bad_request(_FORGOT)


def ended(scheduler: Any, request: Any) -> bool:
    """Whether a pause aborted the streamed input of which a request is a part."""
    return getattr(request, "resumable", False) and request.request_id in getattr(scheduler, _ABORTED, ())


def _noted(original):
    """Scheduler.finish_requests: note the streamed inputs among all requests that a pause aborts."""

    @functools.wraps(original)
    def finish_requests(self, request_ids, *args, **kwargs):
        if request_ids is None:
            aborted = self.__dict__.setdefault(_ABORTED, {})
            aborted |= {name: None for name, held in list(self.requests.items()) if held.resumable}
            for name in list(aborted)[:-_MOST]:
                del aborted[name]
        return original(self, request_ids, *args, **kwargs)

    return finish_requests


def end(state: Any, output: Any) -> bool:
    """Whether the engine core aborted a streamed input, or refused a part of it. The streamed input then ends.

    vLLM's front end takes that for the end of a part. The engine core would answer a later part as if no part had been
    before it. state: RequestState. output: EngineCoreOutput.
    """
    from vllm.v1.engine import FinishReason

    failed = output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR)
    if not failed or not getattr(state, "streaming_input", False):
        return False
    state.streaming_input = False
    if state.queue is not None:
        setattr(state.queue, _ENDED, True)
    return True


def keep(state: Any, request: Any) -> None:
    """Keep a part's parameters for the parts behind it. state: vLLM's RequestState."""
    if request.resumable:
        setattr(state, _PARAMS, request.sampling_params)


def _drawn_anew(original):
    """GPUModelRunner._update_streaming_request: a part draws with its own seed, as a request of its own does."""

    @functools.wraps(original)
    def _update_streaming_request(self, req_id, new_req_data, *args, **kwargs):
        state = original(self, req_id, new_req_data, *args, **kwargs)
        state.generator = _generator(state.sampling_params, self.device)
        return state

    return _update_streaming_request


def _generator(params: Any, device: Any) -> Any:
    """A torch.Generator for parameters that sample with a seed, as model runner V1 makes it for a request. Or None."""
    import torch
    from vllm.sampling_params import SamplingType

    if params is None or params.sampling_type != SamplingType.RANDOM_SEED:
        return None
    return torch.Generator(device=device).manual_seed(params.seed)


SEAMS = (
    Seam(
        name="streamed.ended",
        targets=(Target("vllm.v1.core.sched.scheduler", "Scheduler.finish_requests"),),
        close=_noted,
        why="a pause that aborts all requests ends a streamed input between two parts. vLLM takes the next part for "
        "the first of another one, and answers it without the parts before",
        how="the engine core keeps the ids of these streamed inputs and refuses their parts. The front end ends them",
        until="upstream's front end ends a streamed input that the engine core aborts",
        causes=(29,),
    ),
    Seam(
        name="streamed.seeds",
        targets=(Target("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._update_streaming_request"),),
        close=_drawn_anew,
        why="model runner V1 makes a generator for the first part of a streamed input alone. A seed of a later part is "
        "ignored, and asynchronous scheduling draws for tokens that are dropped",
        how="each part draws from a generator of its own seed",
        until="upstream makes the generator of a part from its seed",
        causes=(21, 29),
    ),
)
