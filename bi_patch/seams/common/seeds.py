"""Unseeded requests: each gets a seed of its own once, and its answer names the seed.

With BI_PATCH_UNSEEDED=random, the front end draws, so that the seed is at hand for the answer. The engine core draws
for the requests of other clients. With BI_PATCH_UNSEEDED=derive, only the engine core gives seeds: it counts identical
requests, and all clients meet there. The core returns a seed that it gave in the request's trace headers, which every
output of the request repeats.
"""

import copy
import functools
from collections.abc import Callable

from bi_patch import settings
from bi_patch.errors import UnsupportedFeature
from bi_patch.ops import seeds
from bi_patch.seams import active
from bi_patch.seams.common import streamed, weights
from bi_patch.seams.common.refused import bad_request
from bi_patch.seams.model import Policy, Seam, Target

HEADER = "bi-patch-seed"
_GREEDY_BELOW = 1e-5  # vllm.sampling_params._SAMPLING_EPS
_SEED = "_bi_patch_seed"  # attribute of vLLM's RequestState
_DERIVED = "_bi_patch_derived"  # attribute of vLLM's EngineCore


def samples(params) -> bool:
    """Whether parameters ask for random sampling. params: SamplingParams, PoolingParams or None."""
    return getattr(params, "temperature", 0.0) >= _GREEDY_BELOW


def lacks_seed(params) -> bool:
    """Whether parameters ask for random sampling without a seed."""
    return samples(params) and params.seed is None


def source(core, request) -> Callable[[], int] | None:
    """What gives an unseeded request its seed in the engine core, to call once the core took the request. None for
    other requests.

    core: vLLM's EngineCore. request: the EngineCoreRequest.
    Raises UnsupportedRequest for streaming input without a seed, and for a request from which no seed can be derived.
    """
    if not lacks_seed(request.sampling_params):
        return None
    if request.resumable:
        raise bad_request(
            "seeds.request: the request streams its input and samples without a seed, and each part of the input would "
            "get a seed of its own. Give it a seed"
        )
    return _derived(core, request) if active.unseeded == "derive" else seeds.drawn


def give(added, seed: int) -> None:
    """Give a request its seed, and return the seed with each output. added: the Request that the core made."""
    added.sampling_params = _seeded(added.sampling_params, seed)
    added.trace_headers = {**(added.trace_headers or {}), HEADER: str(seed)}


def identity(request) -> tuple:
    """What makes two requests identical for BI_PATCH_UNSEEDED=derive: prompt, LoRA adapter, salt and parameters."""
    lora, params = request.lora_request, request.sampling_params
    extra = {k: v for k, v in (params.extra_args or {}).items() if k != "kv_transfer_params"}  # names this request
    left_out = {"extra_args", "n", "skip_clone"}
    return (
        request.prompt_token_ids,
        request.prompt_embeds,
        request.prompt_is_token_ids,
        [(f.identifier, f.mm_position.offset, f.mm_position.length) for f in request.mm_features or ()],
        lora.lora_name if lora is not None else None,
        request.cache_salt,
        {n: getattr(params, n) for n in params.__struct_fields__ if not n.startswith("_") and n not in left_out},
        extra,
    )


def _derived(core, request) -> Callable[[], int]:
    table = core.__dict__.get(_DERIVED)
    if table is None:
        table = core.__dict__[_DERIVED] = seeds.Derived(core.vllm_config.model_config.seed)
    try:
        return functools.partial(table.seed, table.key(*identity(request)))
    except TypeError as error:
        raise bad_request(f"seeds.request: {error} (BI_PATCH_UNSEEDED=derive). Give it a seed") from error


def _seeded(params, seed: int):
    """A copy of SamplingParams with this seed: several requests may share the original."""
    params = copy.copy(params)
    params.__dict__.pop("sampling_type", None)  # vLLM keeps the type of an unseeded request
    params.seed = seed
    return params


def _draw(request, seed: int | None = None) -> None:
    """Give an unseeded request a seed in the front end. seed: None to draw the seed."""
    if lacks_seed(request.sampling_params) and active.unseeded == "random":
        request.sampling_params = _seeded(request.sampling_params, seeds.drawn() if seed is None else seed)


def _of_parent(original):
    """ParentRequest.__init__: draw one seed for a request of n answers. vLLM gives answer i the seed + i."""

    @functools.wraps(original)
    def __init__(self, request, *args, **kwargs):
        _draw(request)
        original(self, request, *args, **kwargs)

    return __init__


def _of_request(original):
    """OutputProcessor.add_request: draw the seed of a request before the request goes to the engine core."""

    @functools.wraps(original)
    def add_request(self, request, *args, **kwargs):
        # As vLLM's: request, prompt, parent_req, request_index, queue.
        queue = args[3] if len(args) > 3 else kwargs.get("queue")
        streamed.check_front(self.request_states, request, queue)
        # Later parts of a streamed input keep the seed of its first part.
        _draw(request, getattr(self.request_states.get(request.request_id), _SEED, None))
        original(self, request, *args, **kwargs)
        state = self.request_states.get(request.request_id)
        if state is not None:
            setattr(state, _SEED, request.sampling_params.seed if samples(request.sampling_params) else None)
            streamed.keep(state, request)

    return add_request


def _from_core(original):
    """OutputProcessor.process_outputs: read the seeds that the engine core gave, and whether weights changed. A
    streamed input that the engine core aborted has ended."""

    @functools.wraps(original)
    def process_outputs(self, engine_core_outputs, *args, **kwargs):
        ended = []
        for output in engine_core_outputs:
            state = self.request_states.get(output.request_id)
            if state is not None:
                weights.read(state, output)
                if streamed.end(state, output):
                    ended.append(output.request_id)
            if output.trace_headers and HEADER in output.trace_headers:
                said = output.trace_headers[HEADER]
                if state is not None and said.isdecimal():  # a client's own header can hold anything
                    setattr(state, _SEED, int(said))
        found = original(self, engine_core_outputs, *args, **kwargs)
        if ended:  # of a refused part, the engine core still has the parts before
            found.reqs_to_abort.extend(ended)
        return found

    return process_outputs


def _of_answer(original):
    """RequestState._new_completion_output: name the seed in the answer, and whether weights changed meanwhile."""

    @functools.wraps(original)
    def _new_completion_output(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.seed = getattr(self, _SEED, None)
        weights.tell(self, output)
        return output

    return _new_completion_output


def _one_core(config) -> None:
    active.unseeded = settings.read().unseeded  # as the engine core that this process starts will read it
    if config.parallel_config.data_parallel_size > 1 and active.unseeded == "derive":
        raise UnsupportedFeature(
            "seeds.derived: BI_PATCH_UNSEEDED=derive counts identical requests in one engine core, and data "
            "parallelism has several. Use BI_PATCH_UNSEEDED=random, or give each request a seed"
        )


_OUTPUTS = "vllm.v1.engine.output_processor"
_WHY = (
    "a runner draws the seed or the noise of an unseeded request in the order of arrival, and V2 draws again after a "
    "preemption. So nobody can replay the answer"
)
_UNTIL = "upstream gives each request a seed on arrival and returns it"

SEAMS = (
    Seam(
        name="seeds.request",
        targets=(Target(_OUTPUTS, "OutputProcessor.add_request"),),
        close=_of_request,
        why=_WHY,
        how="an unseeded request gets a random seed of its own once, before it goes to the engine core",
        until=_UNTIL,
        causes=(29,),
    ),
    Seam(
        name="seeds.parent",
        targets=(Target("vllm.v1.engine.parallel_sampling", "ParentRequest.__init__"),),
        close=_of_parent,
        why=_WHY,
        how="an unseeded request with n > 1 gets one random seed, and answer i gets this seed + i, as vLLM does for "
        "seeded requests",
        until=_UNTIL,
        causes=(29,),
    ),
    Seam(
        name="seeds.from_core",
        targets=(Target(_OUTPUTS, "OutputProcessor.process_outputs"),),
        close=_from_core,
        why="the front end does not know a seed that the engine core gave to a request",
        how="the front end reads the seed from the trace headers, which the engine core returns with each output",
        until=_UNTIL,
        causes=(29,),
    ),
    Seam(
        name="seeds.answer",
        targets=(Target(_OUTPUTS, "RequestState._new_completion_output"),),
        close=_of_answer,
        why="an answer can be replayed only if its seed is known",
        how="each sampled answer (CompletionOutput) has the attribute `seed`",
        until=_UNTIL,
        causes=(29,),
    ),
)

POLICIES = (
    Policy(
        name="seeds.derived",
        apply=_one_core,
        why="with BI_PATCH_UNSEEDED=derive, identical requests are counted in one engine core",
    ),
)
