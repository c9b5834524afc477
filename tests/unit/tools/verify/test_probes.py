"""Every probe on a simulated engine: each probe finds an existing difference, and reports none where there is none."""

import json
from types import SimpleNamespace

import msgspec
import pytest

from bi_patch.tools.verify import levels, probes, streams
from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.case import Pause
from bi_patch.tools.verify.engine import Info, LocalEngine
from bi_patch.tools.verify.probes import crossing, online
from bi_patch.tools.verify.probes.scores import has_tie

WORKLOAD = probes.Workload.random(500, long=600, lengths=(3, 40, 70), prefix=40, clients=6)

WITHIN = (*probes.PROBES, *probes.ONLINE_PROBES)
BLIND = ("decode = prefill", "prompt logprobs")  # the leak is in decoded logprobs only


@pytest.mark.parametrize("probe", WITHIN, ids=lambda p: p.name)
def test_every_probe_passes_an_invariant_engine_and_compares_something(probe, arithmetic):
    result = probe.run(arithmetic(), WORKLOAD)
    assert result.axis == probe.name and result.compared > 0 and result.differing == 0 and not result.first


@pytest.mark.parametrize("probe", [p for p in WITHIN if p.name not in BLIND], ids=lambda p: p.name)
def test_every_probe_catches_a_batch_that_leaks(probe, arithmetic):
    result = probe.run(arithmetic(leak=True), WORKLOAD)
    assert result.differing > 0 and result.largest > 0 and result.first


@pytest.mark.parametrize("cross", probes.CROSS_PROBES, ids=lambda p: p.name)
def test_cross_probes(cross, arithmetic):
    base = arithmetic()
    expected = cross.collect(base, WORKLOAD)
    changes = cross.changes(base)
    assert changes
    for change in changes:
        other = arithmetic()
        if cross.name == "preemption":
            with pytest.raises(probes.NotExercised, match="preemption"):
                cross.collect(other, WORKLOAD, change)
            continue
        result = cross.judge(change, expected, cross.collect(other, WORKLOAD, change))
        assert result.compared > 0 and result.differing == 0


def test_probes_that_cannot_happen_say_so(arithmetic):
    with pytest.raises(probes.NotExercised):
        list(probes.prefix_cache(probes.Run(arithmetic(prefix_caching=False), WORKLOAD)))
    with pytest.raises(probes.NotExercised):
        list(probes.long_prompt(probes.Run(arithmetic(), probes.Workload.random(500))))
    assert "off" in named(probes.PROBES, "prefix cache").missing(arithmetic(prefix_caching=False))
    ranks = named(probes.FEATURE_PROBES, "tensor parallel size")
    for changed, said in (
        ({"platform": "h100"}, "one device"),
        ({"mode": "armed"}, "BI_PATCH_TP_INVARIANT=8"),
    ):
        engine = arithmetic()
        engine.info = msgspec.structs.replace(engine.info, **changed)
        assert said in ranks.missing(engine)


def test_a_quantized_model_that_is_no_local_folder_gets_no_new_weights(tmp_path):
    """Its configuration is not at hand to say which schemes it has."""
    engine = SimpleNamespace(
        options=SimpleNamespace(random_weights=None, tied=False, model="an/AWQ-model", dtype="bfloat16"),
        info=SimpleNamespace(platform="cpu", quantization="awq", device="a CPU"),
    )
    new_weights = named(probes.FEATURE_PROBES, "weight update")
    assert "local folder" in new_weights.missing(engine)
    held = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": held}))
    (tmp_path / "model.safetensors").touch()
    engine.options.model = str(tmp_path)
    assert new_weights.missing(engine) == ""
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": held | {"bits": 8}}))
    assert "weights are quantized (awq" in new_weights.missing(engine)


def test_numbers_of_ranks(arithmetic, tmp_path):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 12}')
    changes = named(probes.FEATURE_PROBES, "tensor parallel size").changes

    def sizes(mode="stock", leaves=0, **options):
        engine = arithmetic()
        engine.options = engine.options.but(model=str(tmp_path), **options)
        engine.info = msgspec.structs.replace(engine.info, mode=mode, leaves=leaves)
        return [change.options["extra"]["tensor_parallel_size"] for change in changes(engine)]

    assert sizes() == [2, 4]
    assert sizes(extra={"tensor_parallel_size": 2}) == [1, 4]
    assert sizes("armed", 2) == [2]
    assert sizes("armed", 8) == [2, 4]


def test_a_pause_of_the_next_answers():
    """Nothing is computed for some steps, then the engine wakes up. Later answers have no pause."""
    did, engine = [], LocalEngine.__new__(LocalEngine)
    engine._pause = None
    engine._llm = SimpleNamespace(
        sleep=lambda level, mode: did.append((level, mode)),
        reset_prefix_cache=lambda reset_running_requests: did.append(reset_running_requests),
        wake_up=lambda: did.append("awake"),
    )
    for forget, began in ((False, [(0, "keep")]), (True, [(0, "keep"), True])):
        engine.pause(Pause(3, forget))
        calls = engine._paused()
        assert list(calls) == [3, 3 + Pause.STEPS] and engine._paused() == {}
        for call in calls.values():
            call()
        assert did == [*began, "awake"]
        did.clear()


def test_an_engine_pauses_early_and_late_with_and_without_keys_and_values(arithmetic):
    engine = arithmetic()
    named(probes.PROBES, "pauses").run(engine, WORKLOAD)
    found = [(pause["step"], pause["forget"]) for pause in engine.pauses]
    assert set(found) == {(step, forget) for step in (1, 3) for forget in (False, True)}
    sampled = len(WORKLOAD.subjects) // 2  # a sampled request keeps its keys and values
    assert found.count((3, False)) - found.count((3, True)) == sampled


@pytest.mark.parametrize(
    ("mode", "vllm", "extra", "said"),
    [
        ("armed", "0.32.0", {}, ""),
        ("armed", "0.31.0", {"async_scheduling": False}, ""),
        ("stock", "0.26.0", {"speculative_config": {"method": "ngram"}}, ""),
        ("armed", "0.32.0", {"speculative_config": {"method": "ngram"}}, "speculative decoding"),
        ("armed", "0.26.0", {}, "asynchronous scheduling"),
    ],
)
def test_streamed_inputs_are_left_out_where_the_engine_refuses_them(arithmetic, mode, vllm, extra, said):
    engine = arithmetic()
    engine.options = engine.options.but(extra=extra)
    engine.info = msgspec.structs.replace(engine.info, mode=mode, vllm=vllm)
    found = named(probes.PROBES, "streamed inputs").missing(engine)
    assert said in found and bool(said) == bool(found)


def test_streamed_inputs_are_left_out_where_mla_has_two_forms(arithmetic):
    engine = arithmetic()
    engine.info = msgspec.structs.replace(engine.info, two_forms=True)
    assert "two forms" in named(probes.PROBES, "streamed inputs").missing(engine)


def test_a_streamed_input_is_the_prompt_and_the_answers_without_their_last_tokens():
    request = Request((1, 2, 3, 11, 12, 4, 5), max_tokens=4, parts=((3, 3),))
    assert streams.parts(request) == [((1, 2, 3), 3), ((4, 5), 4)]
    longer = Request((1, 2, 3, 11, 12, 4, 5, 21, 6), max_tokens=7, parts=((3, 3), (7, 2)))
    assert streams.parts(longer) == [((1, 2, 3), 3), ((4, 5), 2), ((6,), 7)]


def named(registry, name):
    return next(probe for probe in registry if probe.name == name)


def test_every_difference_keeps_the_pair_that_shows_it(arithmetic):
    leaking = probes.Run(arithmetic(leak=True), WORKLOAD)
    for probe in probes.PROBES:
        for case in probe.cases(leaking):
            assert case.axis == probe.name and case.label
            assert case.alone.request.prompt == case.company.request.prompt or case.part == "decode"
            if case.differs and not case.part:
                (again,) = [arithmetic(leak=True).generate(case.company.requests)[case.company.index]]
                assert again.logprobs == case.got.logprobs


def test_more_sizes_than_the_engine_holds_are_left_out():
    info = Info("armed", "", "", "", 1, 16, 500, capture_sizes=(1, 2, 4, 8, 16, 512))
    assert levels.edges(info, 1000, 264) == [1, 2, 3, 4, 5, 8, 9, 16, 17]
    assert levels.edges(info, 2, 264) == [2, 3, 16, 17] and levels.edges(info, 0, 264) == ()


@pytest.mark.parametrize("level", levels.LEVELS.values(), ids=levels.LEVELS)
def test_a_level_fits_an_engine_of_any_length(arithmetic, level):
    for length in (64, 300, 4096):
        engine = arithmetic()
        engine.options = engine.options.but(max_model_len=length)
        load = levels.workload(level, engine, 9)
        longest = max(map(len, (*load.subjects, *load.fillers, load.prefix, load.long or ())))
        assert load.subjects and longest + 2 * load.generate + 2 <= length
        assert max(load.sizes) <= engine.options.max_num_seqs


def test_ties_are_seen():
    assert has_tie([(4, -1.0), (9, -2.0), (3, -1.0)]) and not has_tie([(4, -1.0), (9, -2.0)]) and not has_tie([])


def test_clients_ask_for_every_kind():
    asked = online.asked(256, 2000, 1500, 5)
    assert len(set(asked)) == 256 and all(isinstance(r, Request) for r in asked)
    assert {(r.temperature, r.prompt_logprobs) for r in asked} == {(0.0, None), (0.7, None), (1.0, None), (0.0, 1)}
    assert all(r.seed is not None for r in asked if r.temperature)


def test_a_small_cache_is_counted_in_the_blocks_of_every_kv_group(arithmetic):
    engine = arithmetic(max_num_seqs=264)
    one = Info("armed", "0.33.0", "2.13.0", "CPU", 2, 16, 500)
    two = Info("armed", "0.33.0", "2.13.0", "CPU", 2, 16, 500, kv_blocks=200, kv_groups=(16, 32), kv_longest=300)
    assert one.blocks(33) == 3 and two.blocks(33) == 3 + 2 and two.kv_tokens == 100 * 16
    for info, blocks in ((one, 4096 // 16 + 1), (two, 301)):
        engine.info = info
        (change,) = crossing.few_blocks(engine)
        assert change.options == {"kv_blocks": blocks} and not crossing.needs_crossing(engine)
        batch = crossing.crossing_blocks(engine, WORKLOAD)
        before, after = (sum(info.blocks(n) for n in lengths) for lengths in _lengths(batch))
        assert before >= blocks - info.blocks(1) and after > blocks, "all that are admitted together outgrow the cache"


def test_both_engines_of_a_small_cache_get_the_same_requests(arithmetic):
    # States of recurrent layers in large blocks: the cache holds fewer blocks than there are requests.
    engine = arithmetic(max_num_seqs=264)
    sizes = {"block_size": 4096, "kv_groups": (4096, 4096), "kv_longest": 5, "chunks": True}
    engine.info = Info("armed", "0.33.0", "2.13.0", "CPU", 2, vocab_size=500, **sizes)
    (change,) = crossing.few_blocks(engine)
    assert change.options == {"kv_blocks": 6, "max_num_seqs": 6}
    batch = crossing.crossing_blocks(engine, WORKLOAD)
    engine.options = engine.options.but(**change.options)
    assert len(batch) == 7 and crossing.crossing_blocks(engine, WORKLOAD) == batch


def _lengths(batch):
    return [len(r.prompt) for r in batch], [len(r.prompt) + r.max_tokens for r in batch]


@pytest.fixture
def featured(arithmetic):
    """featured(leak, **options): an engine that sleeps and returns experts; with `leak` both change its answers."""

    class Featured(arithmetic):
        slept = 0

        def ask(self, do, data):
            assert do == "sleep"
            self.levels = [*getattr(self, "levels", []), msgspec.msgpack.decode(data)]
            self.slept = self.leaks

        def generate(self, requests):
            experts = [f"{i % 4:02x}" for i in range(90)]
            wrong = ["ff"] if self.leaks and len(requests) > 1 else []
            return [
                msgspec.structs.replace(a, experts=wrong + experts[: len(r.prompt)], logprobs=self._after(a))
                for r, a in zip(requests, super().generate(requests))
            ]

        def _after(self, answer):
            return [value - self.slept for value in answer.logprobs]

    def make(leak, **options):
        engine = Featured(**options)
        engine.leaks = leak
        return engine

    return make


@pytest.mark.parametrize("name", ["sleep and wake", "routed experts"])
def test_features_of_a_gpu_are_compared(name, featured):
    probe = named(probes.FEATURE_PROBES, name)
    assert probe.missing(featured(False)), "not on CPU"
    good, bad = (probe.run(featured(leak), WORKLOAD) for leak in (False, True))
    assert good.compared > 0 and not good.differing and bad.differing > 0


def test_random_weights_are_not_loaded_again_after_a_sleep(featured):
    probe = named(probes.FEATURE_PROBES, "sleep and wake")
    for seed, levels_ in ((None, [1, 2]), (7, [1])):
        engine = featured(False, random_weights=seed)
        probe.run(engine, WORKLOAD)
        assert engine.levels == levels_


def test_an_engine_that_returns_no_experts_is_no_pass(arithmetic):
    with pytest.raises(probes.NotExercised, match="returned none"):
        named(probes.FEATURE_PROBES, "routed experts").run(arithmetic(), WORKLOAD)


def test_a_model_that_needs_chunks_beside_a_cache_is_computed_whole_without_one(arithmetic):
    """vLLM keeps the states of recurrent layers for a prefix cache where a chunk ends."""
    engine = arithmetic()
    assert crossing.chunk_changes(engine)[-1].options == {"chunk": engine.options.max_model_len, "chunked": False}
    engine.info = msgspec.structs.replace(engine.info, chunks=True)
    whole = crossing.chunk_changes(engine)[-1]
    assert whole.options["prefix_caching"] is False and whole.options["chunked"] is False
    assert "prefix cache off" in whole.label


def test_an_engine_that_computes_prompts_whole_gets_no_smaller_budget(arithmetic):
    """vLLM turns chunks and the prefix cache off for MLA on a CPU without AMX. A prompt above the budget would wait for
    ever there."""
    engine = arithmetic()
    engine.info = msgspec.structs.replace(engine.info, whole=True, cached=False)
    for name in ("chunk budget", "custom logits processors", "prefix cache"):
        assert "computed whole" in named(probes.PROBES, name).missing(engine)
    for name in ("aborts and stops", "structured output"):
        result = named(probes.PROBES, name).run(engine, WORKLOAD)
        assert result.compared > 0 and not hasattr(engine, "chunk")
    # Other settings of a running engine can be changed.
    assert not named(probes.PROBES, "processed logprobs").missing(engine)
