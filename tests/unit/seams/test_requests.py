"""An error names a request's unsupported parameter. bi_patch leaves all other parameters to vLLM's own validation."""

import asyncio
import copy
import inspect
import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from packaging.version import Version
from vllm.exceptions import VLLMValidationError

from bi_patch import settings
from bi_patch.errors import UnsupportedFeature, UnsupportedRequest
from bi_patch.seams import active
from bi_patch.seams.common import arriving, parameters, requests, seeds, weights


def ask(v2=False, fast_prefill=False, drafts=False, **parameters):
    cache = SimpleNamespace(kv_sharing_fast_prefill=fast_prefill)
    speculative = SimpleNamespace() if drafts else None
    config = SimpleNamespace(use_v2_model_runner=v2, cache_config=cache, speculative_config=speculative)
    processor = SimpleNamespace(vllm_config=config)
    validate = requests._checked(lambda self, params, tasks: "passed")
    return validate(processor, SimpleNamespace(**parameters), ("generate",))


@pytest.mark.parametrize(
    "given, said",
    [
        ({"thinking_token_budget": 5}, "thinking_token_budget with model runner V1"),
        ({"prompt_logprobs": 0, "skip_reading_prefix_cache": False}, "skip_reading_prefix_cache=False"),
        ({"prompt_logprob_token_ids": [[7]], "skip_reading_prefix_cache": False}, "skip_reading_prefix_cache=False"),
        ({"v2": True, "fast_prefill": True, "prompt_logprobs": 1}, "--kv-sharing-fast-prefill"),
        (
            {"v2": True, "prompt_logprob_token_ids": [[1]], "skip_reading_prefix_cache": False},
            "prompt_logprob_token_ids with skip_reading_prefix_cache=False",
        ),
        ({"drafts": True, "min_p": 0.1}, "min_p with speculative decoding"),
        ({"drafts": True, "logit_bias": {3: 1.0}}, "logit_bias with speculative decoding"),
        ({"drafts": True, "v2": True, "thinking_token_budget": 5}, "thinking_token_budget with speculative decoding"),
        ({"drafts": True, "v2": True, "logprob_token_ids": [3]}, "logprob_token_ids with speculative decoding"),
        ({"seed": 2**63, "n": 1}, "more than 64 bits"),
        ({"seed": -(2**63) - 1, "n": 1}, "more than 64 bits"),
        ({"seed": 2**63 - 2, "n": 3}, "more than 64 bits"),
        ({"seed": -3, "n": 3}, "holds -1"),
        ({"v2": True, "allowed_token_ids": list(range(1025))}, "1025 allowed_token_ids, more than 1024"),
        ({"v2": True, "logit_bias": dict.fromkeys(range(1025), 1.0)}, "1025 logit_bias, more than 1024"),
        ({"v2": True, "logprob_token_ids": list(range(129))}, "129 logprob_token_ids, more than 128"),
    ],
)
def test_it_is_refused_by_name_as_a_bad_request(given, said):
    with pytest.raises(UnsupportedRequest, match=said) as caught:
        ask(**given)
    # A server answers 400 to these two, depending on the release of vLLM.
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, VLLMValidationError)
    assert type(caught.value).__name__ == "UnsupportedRequest"


def test_every_field_of_the_installed_release_is_examined_or_refused():
    """A new field belongs into EXAMINED, or into this list of those that are refused."""
    import msgspec
    from vllm import PoolingParams, SamplingParams

    fields = {field.name for kind in (SamplingParams, PoolingParams) for field in msgspec.structs.fields(kind)}
    assert {name for name in fields - parameters.EXAMINED if name[0] != "_"} == {"trace_decode_token_ids"}
    assert parameters.unknown(SamplingParams()) == parameters.unknown(PoolingParams()) == []


def test_a_field_that_nobody_has_examined_is_refused():
    import msgspec

    class Later(msgspec.Struct):
        temperature: float = 1.0
        sums_by_arrival: bool = False
        tokens: list[int] = []
        rows: object = None

    assert parameters.unknown(Later(rows=np.array([[3, 4]]))) == ["rows"]
    assert parameters.unknown(Later(temperature=0.5)) == []
    assert parameters.unknown(Later(sums_by_arrival=True, tokens=[3])) == ["sums_by_arrival", "tokens"]
    assert parameters.unknown(SimpleNamespace(temperature=0.5, sums_by_arrival=False)) == ["sums_by_arrival"]
    config = SimpleNamespace(use_v2_model_runner=True, cache_config=None)
    with pytest.raises(UnsupportedRequest, match="sums_by_arrival, which nobody has examined"):
        requests.check(config, Later(sums_by_arrival=True))


@pytest.mark.parametrize(
    "given",
    [
        {},  # pooling parameters have none of these fields
        {"v2": True, "thinking_token_budget": 5},
        {"prompt_logprobs": 1, "skip_reading_prefix_cache": None},
        {"fast_prefill": True, "prompt_logprobs": None, "thinking_token_budget": None},
        {"min_p": 0.1, "logit_bias": {3: 1.0}},
        {"drafts": True, "min_p": 0.0, "logit_bias": None, "logprob_token_ids": [3]},
        {"seed": 2**63 - 3, "n": 3},
        {"seed": -3, "n": 2},
        {"seed": None, "n": 2, "temperature": 1.0},
        {"allowed_token_ids": list(range(1025)), "logit_bias": dict.fromkeys(range(1025), 1.0)},
        {"logprob_token_ids": list(range(129))},
        {"v2": True, "logprob_token_ids": list(range(128))},
        {"v2": True, "allowed_token_ids": list(range(1024)), "logit_bias": dict.fromkeys(range(1024), 1.0)},
    ],
)
def test_all_else_passes(given):
    assert ask(**given) == "passed"


def test_stop_tokens_need_room_beside_min_tokens():
    from vllm import SamplingParams

    cache = SimpleNamespace(kv_sharing_fast_prefill=False)
    config = SimpleNamespace(use_v2_model_runner=True, cache_config=cache)
    for count, minimum in ((129, 0), (128, 3)):
        requests.check(config, SamplingParams(seed=1, stop_token_ids=list(range(count)), min_tokens=minimum))
    with pytest.raises(UnsupportedRequest, match="129 all_stop_token_ids with min_tokens, more than 128"):
        requests.check(config, SamplingParams(seed=1, stop_token_ids=list(range(129)), min_tokens=3))


def test_the_room_of_the_tables_is_that_of_the_installed_release():
    from vllm.v1.worker.gpu.sample import logit_bias, logprob

    sizes = (logit_bias.MAX_NUM_ALLOWED_TOKEN_IDS, logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS)
    sizes += (logit_bias.MAX_NUM_STOP_TOKEN_IDS, logprob.MAX_LOGPROB_TOKEN_IDS)
    assert sizes == tuple(requests.ROOM.values())


@pytest.mark.parametrize(
    "count, length, said",
    [
        (128, 8, ""),
        (129, 1, "129 bad words, more than 128"),
        (128, 9, "1152 tokens of bad words, more than 1024"),
    ],
)
def test_the_core_refuses_bad_words_that_end_a_step_of_model_runner_v2(count, length, said):
    """vLLM's front end counts the words and not their tokens, or neither."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.sample.bad_words import BadWordsState

    params, core = SamplingParams(seed=1, bad_words=["word"]), Core()
    params._bad_words_token_ids = [[7] * length] * count
    if not said:
        assert core.add(params) and BadWordsState.add_request(MagicMock(), 0, params)
        return
    with pytest.raises(ValueError, match="Too many"):
        BadWordsState.add_request(MagicMock(), 0, params)
    with pytest.raises(UnsupportedRequest, match=said):
        core.add(params)
    core.vllm_config.use_v2_model_runner = False
    assert core.add(params)


def test_refuse_names_requests_that_sample_without_a_seed(monkeypatch):
    monkeypatch.setattr(active, "unseeded", "refuse")
    with pytest.raises(UnsupportedRequest, match="BI_PATCH_UNSEEDED=refuse"):
        ask(seed=None, n=1, temperature=0.5)
    assert ask(seed=None, n=1, temperature=0.0) == ask(seed=4, n=1, temperature=0.5) == "passed"


class Params:
    """The fields of vLLM's SamplingParams that the engine core's seam reads."""

    __struct_fields__ = ("temperature", "seed", "n", "extra_args", "_private")

    def __init__(self, **given):
        vars(self).update({"temperature": 1.0, "seed": None, "n": 1, "extra_args": None, "_private": object(), **given})


class Core:
    """An engine core that records what it preprocessed."""

    failing = False

    def __init__(self):
        cache = SimpleNamespace(kv_sharing_fast_prefill=False)
        model = SimpleNamespace(
            seed=0, dtype=torch.bfloat16, get_inputs_embeds_size=lambda: 4, get_vocab_size=lambda: 9
        )
        self.scheduler = SimpleNamespace(requests={})
        self.vllm_config = SimpleNamespace(use_v2_model_runner=True, cache_config=cache, model_config=model)
        self.seen = []  # what the engine core worked on
        self.kept = []  # what its multimodal cache holds
        self.mm_receiver_cache = SimpleNamespace(get_and_update_features=self.kept.extend)

    def add(self, params, **given):
        request = SimpleNamespace(
            **{
                "abort_immediately": False, "resumable": False, "prompt_token_ids": [1, 2], "prompt_embeds": None,
                "prompt_is_token_ids": None, "mm_features": None, "lora_request": None, "cache_salt": None,
                "request_id": "", **given,
            },
            params=params,
            sampling_params=params,
        )  # fmt: skip

        def original(core, request):
            if core.failing:
                raise LookupError("a part of the request is not in the cache")
            core.seen.append(request)
            made = {"sampling_params": request.sampling_params, "trace_headers": {"traceparent": "x"}}
            return SimpleNamespace(**made, request_id=request.request_id, lora_request=request.lora_request), 0

        return requests._checked_in_core(original)(self, request)[0]


def test_the_core_draws_a_seed_and_returns_it_in_the_trace_headers():
    core, params = Core(), Params()
    found = [core.add(params) for _ in range(2)]
    assert params.seed is None and found[0].sampling_params.seed != found[1].sampling_params.seed
    assert found[0].trace_headers == {"traceparent": "x", seeds.HEADER: str(found[0].sampling_params.seed)}
    for own in (Params(seed=5), Params(temperature=0.0)):
        kept = core.add(own)
        assert kept.sampling_params is own and kept.trace_headers == {"traceparent": "x"}


def test_the_core_derives_seeds_from_requests(monkeypatch):
    monkeypatch.setattr(active, "unseeded", "derive")
    first, second = Core(), Core()
    expected = [first.add(Params()).sampling_params.seed for _ in range(3)]
    others = [
        {"cache_salt": "salt"},
        {"lora_request": SimpleNamespace(lora_name="adapter", lora_int_id=1, lora_path="/adapter")},
        {
            "mm_features": [
                SimpleNamespace(identifier="image", mm_position=SimpleNamespace(offset=1, length=4)),
            ]
        },
    ]
    found = []
    for other in [*others, {}]:
        found.append(second.add(Params(), **other).sampling_params.seed)
    assert len({*expected, *found}) == 6 and found[-1] == expected[0]
    with pytest.raises(UnsupportedRequest, match="holds object, from which no seed can be derived"):
        second.add(Params(extra_args={"own": object()}))
    transfer = Params(extra_args={"kv_transfer_params": {"remote": "a"}})
    assert Core().add(transfer).sampling_params.seed == Core().add(Params(extra_args={})).sampling_params.seed


def test_the_core_refuses_before_it_works_on_a_request(monkeypatch):
    """Otherwise a grammar would compile for a refused request. The multimodal cache stays in step with the client's."""
    core = Core()
    image = SimpleNamespace(identifier="image", mm_position=SimpleNamespace(offset=1, length=4))
    with pytest.raises(UnsupportedRequest, match="more than 64 bits"):
        core.add(Params(seed=2**64), mm_features=[image])
    with pytest.raises(UnsupportedRequest, match="streams its input"):
        core.add(Params(), resumable=True, request_id="name")
    monkeypatch.setattr(active, "unseeded", "derive")
    with pytest.raises(UnsupportedRequest, match="no seed can be derived"):
        core.add(Params(extra_args={"own": object()}), mm_features=[image])
    assert core.seen == [] and core.kept == [image, image]
    assert core.add(Params(seed=2**64), abort_immediately=True)  # it only frees what another engine holds


def test_the_core_refuses_a_part_of_a_streamed_input_with_other_logprobs():
    from vllm import SamplingParams

    core = Core()
    core.scheduler.requests["name"] = SimpleNamespace(sampling_params=SamplingParams(seed=1, logprobs=2))
    given = {"resumable": True, "request_id": "name"}
    with pytest.raises(UnsupportedRequest, match="streamed.parts: .* another value of logprobs than"):
        core.add(SamplingParams(seed=1), **given)
    assert core.seen == [] and core.add(SamplingParams(seed=2, logprobs=2, max_tokens=3), **given)


def test_a_part_is_compared_with_a_part_that_the_scheduler_does_not_have_yet():
    """The input thread checks a request before the engine's thread adds the request before it to the scheduler."""
    from vllm import SamplingParams

    core, given = Core(), {"resumable": True, "request_id": "name"}
    first = core.add(SamplingParams(seed=1, logprobs=2), **given)
    with pytest.raises(UnsupportedRequest, match="streamed.parts: .* another value of logprobs than"):
        core.add(SamplingParams(seed=1), **given)
    assert core.add(SamplingParams(seed=1), **given | {"request_id": "other"})
    add = weights._arrival(lambda core, request: core.scheduler.requests.update({request.request_id: request}))
    add(core, first)
    with pytest.raises(UnsupportedRequest, match="another value of logprobs than"):
        core.add(SamplingParams(seed=1), **given)
    core.scheduler.requests.clear()  # the session ended
    assert core.add(SamplingParams(seed=1), **given)


def test_the_latest_part_on_its_way_counts():
    core = Core()
    first, second = (SimpleNamespace(request_id="name") for _ in range(2))
    core.scheduler.requests["name"] = first
    assert arriving.latest(core, "name") is first
    arriving.note(core, second)
    assert arriving.latest(core, "name") is second
    arriving.note(core, third := SimpleNamespace(request_id="name"))
    assert arriving.latest(core, "name") is third


def test_a_request_that_the_scheduler_does_not_take_is_not_on_its_way_any_more():
    core, made = Core(), SimpleNamespace(request_id="name")
    arriving.note(core, made)

    def fails(core, request):
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        weights._arrival(fails)(core, made)
    assert arriving.everyone(core) == [] and arriving.latest(core, "name") is None


def test_the_core_refuses_streamed_inputs_beside_speculation():
    core = Core()
    core.vllm_config.speculative_config = SimpleNamespace()
    with pytest.raises(UnsupportedRequest, match="streams its input, and speculative decoding"):
        core.add(Params(seed=1), resumable=True, request_id="name")
    assert core.seen == [] and core.add(Params(seed=1))


@pytest.mark.parametrize(
    "embeds, said",
    [
        (torch.tensor([[0.0, 1.0, float("nan"), 2.0]]), "NaN or an infinity in torch.bfloat16"),
        (torch.tensor([[0.0, 1.0, float("-inf"), 2.0]], dtype=torch.float16), "NaN or an infinity"),
        (torch.tensor([[0.0, 1.0, 2.0, 1e39]], dtype=torch.float64), "NaN or an infinity in torch.bfloat16"),
        (torch.zeros(3, 5), r"shape \[3, 5\]. Give floating-point numbers of shape \[tokens, 4\]"),
        (torch.zeros(0, 4), r"shape \[0, 4\]"),
        (torch.zeros(4), r"shape \[4\]"),
        (torch.zeros(3, 4, dtype=torch.int32), "torch.int32"),
    ],
)
def test_the_core_refuses_embeddings_that_would_reach_other_requests(embeds, said):
    core = Core()
    with pytest.raises(UnsupportedRequest, match=f"embeds.check: .*{said}"):
        core.add(Params(seed=1), prompt_token_ids=None, prompt_embeds=embeds)
    mixed = {"prompt_embeds": torch.ones(2, 4), "prompt_is_token_ids": [True, False]}
    with pytest.raises(UnsupportedRequest, match="not below the vocabulary's size, 9"):
        core.add(Params(seed=1), prompt_token_ids=[9, 1], **mixed)
    assert core.seen == []
    assert core.add(Params(seed=1), prompt_token_ids=None, prompt_embeds=torch.ones(3, 4, dtype=torch.float16))
    assert core.add(Params(seed=1), prompt_token_ids=[8, 9], **mixed)  # the second token is an embedding


def test_a_front_end_forgets_a_request_that_its_core_did_not_get():
    forgotten = []
    states = {"a-0": None, "b-0": None}  # both run: the name of one of them comes again
    front = SimpleNamespace(request_states=states)
    engine = SimpleNamespace(output_processor=front, abort_request=lambda ids, internal: forgotten.extend(ids))

    def add(self, request_id, error):
        states[f"{request_id}-1"] = None
        if error is not None:
            raise error
        return request_id

    closed = requests._forgotten(add)
    assert closed(engine, "a", None) == "a" and not forgotten
    with pytest.raises(UnsupportedRequest):
        closed(engine, "b", UnsupportedRequest("no"))
    with pytest.raises(TypeError):
        closed(engine, "c", TypeError("cannot be sent"))
    assert forgotten == ["b-1", "c-1"]


class Unsent:
    """An engine core that gets the requests of `named` only, and notes which requests the front end ends."""

    def __init__(self, named, error):
        self.named, self.error, self.got, self.ended = named, error, [], []

    async def add_request_async(self, request):
        if request.request_id not in self.named:
            raise self.error
        self.got.append(request.request_id)

    async def abort_requests_async(self, names):
        self.ended += names

    def shutdown(self, timeout=None):
        """Nothing runs."""


def _asynchronous(named, error):
    """vLLM's own asynchronous front end beside such an engine core, with its `_add_request` closed."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor

    engine = object.__new__(AsyncLLM)
    engine.output_processor, engine.engine_core = OutputProcessor(None, log_stats=False), Unsent(named, error)
    engine.renderer = SimpleNamespace(shutdown=lambda: None)
    engine.check_admission, engine.log_requests, engine.output_handler = lambda **_: None, False, None
    return engine, requests._forgotten_async(AsyncLLM._add_request)


def _made(name, **given):
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import RequestOutputCollector

    params = SamplingParams(**given)
    given = {"prompt_token_ids": [1], "sampling_params": params, "external_req_id": name, "arrival_time": 0.0}
    for field in inspect.signature(EngineCoreRequest).parameters.values():
        given.setdefault(field.name, None if field.default is field.empty else field.default)
    made = EngineCoreRequest(**given | {"request_id": name})
    return made, RequestOutputCollector(params.output_kind, name)


@pytest.mark.parametrize("error", [TypeError("cannot be sent"), asyncio.CancelledError()])
def test_an_asynchronous_front_end_forgets_a_request_that_its_core_did_not_get(error):
    engine, closed = _asynchronous(["a"], error)

    async def add(name):
        made, queue = _made(name)
        await closed(engine, made, None, None, 0, queue)

    asyncio.run(add("a"))
    with pytest.raises(type(error)):
        asyncio.run(add("b"))
    assert list(engine.output_processor.request_states) == engine.engine_core.got == ["a"]
    assert engine.engine_core.ended == ["b"]


def test_an_asynchronous_front_end_forgets_the_other_answers_of_a_request():
    """In vLLM 0.26 and older, each answer of a request's n goes this way."""
    from vllm.v1.engine.parallel_sampling import ParentRequest

    made, queue = _made("p", n=3)
    parent = ParentRequest(made)
    names = [parent.get_child_info(index)[0] for index in range(3)]
    engine, closed = _asynchronous(["a", *names[:2]], TypeError("cannot be sent"))

    async def add():
        running, other = _made("a")
        await closed(engine, running, None, None, 0, other)
        for index, name in enumerate(names):
            child = copy.copy(made)
            child.request_id = name
            await closed(engine, child, None, parent, index, queue)

    with pytest.raises(TypeError):
        asyncio.run(add())
    assert list(engine.output_processor.request_states) == ["a"]
    assert sorted(engine.engine_core.ended) == sorted(names)


def test_an_asynchronous_front_end_keeps_a_streamed_input():
    """vLLM itself ends such a request, once the caller has the error."""
    engine, closed = _asynchronous(["known"], TypeError("cannot be sent"))

    async def add(name, resumable):
        made, queue = _made(name)
        made.resumable = resumable
        await closed(engine, made, None, None, 0, queue)

    asyncio.run(add("known", True))
    engine.engine_core.named = []
    for name, resumable in (("new", True), ("known", True), ("known", False)):  # a first, a middle and a last part
        with pytest.raises(TypeError):
            asyncio.run(add(name, resumable))
    assert set(engine.output_processor.request_states) == {"known", "new"} and not engine.engine_core.ended


def test_a_penalty_of_minus_zero_is_none():
    params = Params(frequency_penalty=-0.0, presence_penalty=-0.0)
    Core().add(params)
    assert [math.copysign(1, getattr(params, f"{kind}_penalty")) for kind in ("frequency", "presence")] == [1, 1]


def test_a_request_that_the_core_could_not_take_counts_for_no_seed(monkeypatch):
    monkeypatch.setattr(active, "unseeded", "derive")
    core, expected = Core(), Core().add(Params()).sampling_params.seed
    core.failing = True
    with pytest.raises(LookupError):
        core.add(Params())
    core.failing = False
    assert core.add(Params()).sampling_params.seed == expected


def test_derived_seeds_need_one_engine_core(monkeypatch):
    monkeypatch.setattr(active, "unseeded", "random")
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=2))
    seeds._one_core(config)
    monkeypatch.setenv("BI_PATCH_UNSEEDED", "derive")
    with pytest.raises(UnsupportedFeature, match="BI_PATCH_UNSEEDED=derive counts"):
        seeds._one_core(config)


def test_no_request_reads_the_environment(monkeypatch):
    """The front end reads BI_PATCH_UNSEEDED with the engine's configuration, and the engine core when it is armed."""
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
    monkeypatch.setattr(active, "unseeded", "random")
    monkeypatch.setenv("BI_PATCH_UNSEEDED", "derive")
    seeds._one_core(config)
    assert active.unseeded == "derive"
    monkeypatch.setattr(settings, "read", None)
    first, second = (Core().add(Params()).sampling_params.seed for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("release", "asynchronous", "refused"), [("0.26.0", 1, 1), ("0.26.0", 0, 0), ("0.33.0", 1, 0)])
def test_a_streamed_input_is_refused_where_a_late_step_may_count(monkeypatch, release, asynchronous, refused):
    core = Core()
    core.vllm_config.scheduler_config = SimpleNamespace(async_scheduling=bool(asynchronous))
    monkeypatch.setattr(active, "plan", SimpleNamespace(release=Version(release), platform="cpu"))
    given = {"params": Params(temperature=0.0), "resumable": True, "request_id": "name"}
    if refused:
        with pytest.raises(UnsupportedRequest, match="--no-async-scheduling"):
            core.add(**given)
    else:
        core.add(**given)
    assert len(core.seen) == 1 - refused
