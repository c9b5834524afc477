"""Weight updates below the engine: identities, block hashes, marks, and a model's load_weights. Stand-ins for vLLM."""

import asyncio
import gc
from types import SimpleNamespace

import pytest
import torch

from bi_patch import files
from bi_patch.errors import NoEngine, UnsupportedFeature, WeightsBroken
from bi_patch.seams import weights
from bi_patch.seams.common import replicas
from bi_patch.seams.common import weights as seams
from bi_patch.seams.cpu import weights as cpu
from bi_patch.training import samplers


@pytest.fixture(autouse=True)
def _own(monkeypatch):
    """Cores and models of this test only."""
    monkeypatch.setattr(weights, "_cores", type(weights._cores)())
    monkeypatch.setattr(weights, "_models", type(weights._models)())
    monkeypatch.setattr(weights, "_writes", type(weights._writes)())
    monkeypatch.setattr(weights, "pending", False)
    monkeypatch.setattr(weights, "_untold", False)


class Request:
    """What the patch points read of vLLM's Request. Its hasher makes two blocks."""

    def __init__(self, name, blocks=0, outputs=0, computed=0, preemptions=0):
        self.request_id, self.blocks = name, blocks
        self.num_output_tokens, self.num_computed_tokens, self.num_preemptions = outputs, computed, preemptions
        self.trace_headers = self.prompt_embeds = None
        self.block_hashes = []
        self.update_block_hashes()

    def update_block_hashes(self):
        for start in (0, 16):
            self.block_hashes.append((tuple(self.block_hashes), keys(self, start, start + 16, 0)[0]))


def _stock(request, start_token_idx, end_token_idx, start_mm_idx):
    return ((("cache_salt", "salt"),) if start_token_idx == 0 else None), start_mm_idx + 1


keys = seams._first_block(_stock)


class Core:
    def __init__(self, *requests, connector=None):
        self.reset = []
        manager = SimpleNamespace(get_block_ids=lambda name: ([0] * self.scheduler.requests[name].blocks,))
        self.scheduler = SimpleNamespace(
            requests={r.request_id: r for r in requests},
            kv_cache_manager=manager,
            connector=connector,
            reset_connector_cache=lambda: self.reset.append(True),
        )
        weights.watch_core(self, seams.renew)


def test_the_first_block_names_the_weights_and_later_blocks_do_not():
    request = Request("a")
    first = request.block_hashes[0][1]
    assert first == (("weights", weights.identity()), ("cache_salt", "salt"))
    assert request.block_hashes[1][1] is None and keys(request, 0, 16, 3)[1] == 4


def test_identities_are_random_and_never_return():
    seen = {weights.identity()}
    for _ in range(100):
        weights.renew()
        seen.add(weights.identity())
    assert len(seen) == 101 and all(len(held) == 32 for held in seen)


def test_each_request_follows_an_update_by_its_state():
    waiting, running = Request("waiting"), Request("running", blocks=2, computed=20)
    preempted, fetched = Request("preempted", outputs=3, preemptions=1), Request("fetched", blocks=1)
    core = Core(waiting, running, preempted, fetched)
    old = {name: list(r.block_hashes) for name, r in core.scheduler.requests.items()}
    weights.renew()
    new = (("weights", weights.identity()), ("cache_salt", "salt"))
    assert waiting.block_hashes[0][1] == preempted.block_hashes[0][1] == new
    for request in (running, fetched):  # nobody else has these hashes
        assert request.block_hashes[0][1] != new and request.block_hashes[0] != old[request.request_id][0]
    assert running.block_hashes[0] != fetched.block_hashes[0]
    marked = {name for name, r in core.scheduler.requests.items() if seams.HEADER in (r.trace_headers or {})}
    assert marked == {"running", "preempted", "fetched"}
    assert not core.reset


def test_a_connector_forgets_what_it_holds():
    core = Core(connector=object())
    weights.renew()
    assert core.reset == [True]


def test_a_request_that_was_hashed_before_an_update_is_hashed_again_on_arrival():
    core, late, added = SimpleNamespace(), Request("late"), []
    weights.renew()
    add = seams._arrival(lambda self, request, wave=0: added.append((request, wave)))
    add(core, late, 3)
    assert added == [(late, 3)] and late.block_hashes[0][1][0] == ("weights", weights.identity())
    before = late.block_hashes[0]
    add(core, late)
    assert late.block_hashes[0] is before


def test_calls_count_as_writes_unless_they_are_known_to_read():
    calls = seams._calls(lambda self, method, *args, **kwargs: [method])
    core = SimpleNamespace(model_executor=SimpleNamespace(collective_rpc=lambda call: None))
    for method in ("reload_weights", "update_weights", "some_extension_method", lambda worker: None):
        before = weights.identity()
        assert calls(core, method) == [method] and weights.identity() != before
    for method in seams.READING:
        before = weights.identity()
        assert calls(core, method) == [method] and weights.identity() == before


@pytest.mark.parametrize(
    ("platform", "model", "said"),
    [
        ("cpu", {"runner_type": "pooling"}, "an engine that pools"),
        ("cuda", {"runner_type": "pooling"}, "an engine that pools"),
        ("cuda", {"quantization": "fp8"}, "quantized weights on CUDA"),
        ("cpu", {"quantization": "fp8"}, ""),
        ("cuda", {}, ""),
        ("cpu", {"lora": True}, "an engine with LoRA"),
        ("cpu", {"leaves": 8}, "an engine with BI_PATCH_TP_INVARIANT"),
    ],
)
def test_an_engine_that_takes_no_new_weights_refuses_such_a_call_and_goes_on(platform, model, said, monkeypatch):
    made = []
    calls = seams._calls(lambda self, method: made.append(method))
    monkeypatch.setattr(seams.active, "plan", SimpleNamespace(platform=platform))
    monkeypatch.setattr(seams.active, "leaves", model.get("leaves", 0))
    lora = SimpleNamespace() if model.get("lora") else None
    config = SimpleNamespace(model_config=SimpleNamespace(**{"quantization": None, **model}), lora_config=lora)
    core = SimpleNamespace(model_executor=SimpleNamespace(collective_rpc=lambda call: None), vllm_config=config)
    before = weights.identity()
    if said:
        for method in ("reload_weights", len):
            with pytest.raises(UnsupportedFeature, match=rf"weights.calls: collective_rpc\({'re|l'}.* {said}"):
                calls(core, method)
        assert not made and weights.identity() == before
    calls(core, "check_health")
    assert made == ["check_health"]


def test_a_call_that_fails_may_have_written():
    def fails(self, method):
        raise RuntimeError("half of it")

    before = weights.identity()
    with pytest.raises(RuntimeError, match="half of it"):
        seams._calls(fails)(SimpleNamespace(), "reload_weights")
    assert weights.identity() != before


def test_only_a_sleep_without_weights_changes_them():
    core = SimpleNamespace()
    sleep, wake = seams._sleep(lambda self, level=1, mode="abort": level), seams._wake(lambda self, tags=None: True)
    before = weights.identity()
    assert sleep(core, 1) == 1 and wake(core) and weights.identity() == before
    assert sleep(core, level=2, mode="keep") == 2
    asleep = weights.identity()
    assert asleep != before and wake(core) and weights.identity() != asleep


def test_an_answer_tells_that_weights_changed():
    state, completion = SimpleNamespace(), SimpleNamespace()
    seams.tell(state, completion)
    assert completion.weights_changed is False
    seams.read(state, SimpleNamespace(trace_headers=None))
    seams.read(state, SimpleNamespace(trace_headers={seams.HEADER: "changed"}))
    seams.tell(state, completion)
    assert completion.weights_changed is True


class Model:
    def __init__(self):
        self.loaded = []

    def load_weights(self, pairs):
        self.loaded += pairs
        return {name for name, _ in pairs}


def test_load_weights_of_a_model_is_seen_and_keeps_no_model_alive():
    model, _core, before = Model(), Core(), weights.identity()
    weights.watch_model(model)
    assert model.load_weights([("a", 1)]) == {"a"} and model.loaded == [("a", 1)]
    assert weights.pending and weights.identity() != before
    weights.settle()
    assert not weights.pending and len(weights._models) == 1
    del model
    gc.collect()
    assert not weights._models


def test_an_update_that_fails_stops_the_engine():
    def fails(model):
        raise UnsupportedFeature("weights.some: a part of the weights")

    model, _core = Model(), Core()
    weights.watch_model(model, settle=fails)
    model.load_weights([("a", 1)])
    with pytest.raises(UnsupportedFeature, match="weights.some"):
        weights.settle()
    step = weights.before_step(lambda self: "an answer")
    for again in (weights.settle, weights.weights_changed, lambda: step(None)):
        with pytest.raises(WeightsBroken, match="Model failed half way.*UnsupportedFeature: weights.some"):
            again()
    del model, again
    gc.collect()
    assert not weights._models
    weights.settle()  # another model's steps run
    assert not weights.pending


def test_a_worker_runs_no_step_with_weights_that_its_core_does_not_know(monkeypatch):
    """A process without engine cores: only a call of the core to its workers says that the core knows."""
    model, step = Model(), weights.before_step(lambda self: "an answer")
    weights.watch_model(model)
    worker = SimpleNamespace(collective_rpc=lambda call: call(None))
    calls = seams._calls(lambda self, method: method())
    monkeypatch.setattr(seams.active, "plan", SimpleNamespace(platform="cuda"))
    for write in (lambda: model.load_weights([("a", 1)]), weights.weights_changed):
        assert step(None) == "an answer"
        write()
        weights.settle()
        for _ in range(2):
            with pytest.raises(WeightsBroken, match=r"not by a call through the engine.*llm\.collective_rpc"):
                step(None)
        calls(SimpleNamespace(model_executor=worker), write)
        assert step(None) == "an answer" and not weights.pending

    def fails():
        model.load_weights([("a", 1)])
        raise ValueError("half of it")

    with pytest.raises(ValueError, match="half of it"):
        calls(SimpleNamespace(model_executor=worker), fails)
    assert step(None) == "an answer"
    core = Core()
    model.load_weights([("a", 1)])
    assert step(None) == "an answer" and core.scheduler is not None


def test_a_load_that_cannot_begin_counts_as_a_write():
    def fails(model):
        raise ValueError("half of it")

    model, before = Model(), weights.identity()
    weights.watch_model(model, fails)
    with pytest.raises(ValueError, match="half of it"):
        model.load_weights([("a", 1)])
    assert weights.pending and weights.identity() != before and not model.loaded


def test_a_write_beside_lora_is_refused_by_name():
    config, settled = SimpleNamespace(lora_config=object()), []
    model = Model()
    weights.watch_model(model, settle=settled.append, written=lambda model: weights.refuse_with_lora(config))
    _core, before = Core(), weights.identity()
    with pytest.raises(UnsupportedFeature, match="weights.lora"):
        weights.weights_changed()
    assert not settled and weights.identity() != before
    with pytest.raises(WeightsBroken, match="weights.lora"):  # it was written already
        weights.before_step(lambda self: "an answer")(None)


def test_weights_changed_needs_an_engine_or_a_model():
    with pytest.raises(NoEngine, match="collective_rpc"):
        weights.weights_changed()
    settled, model = [], Model()
    weights.watch_model(model, settle=settled.append)
    before = weights.identity()
    weights.weights_changed()
    assert settled == [model] and weights.identity() != before


def test_a_layer_that_gets_a_part_of_its_weights_keeps_the_others(monkeypatch):
    from bi_patch.ops.cpu import quantized

    class Layer(SimpleNamespace):
        __hash__ = object.__hash__

    old, layer = torch.ones(3), Layer(scale=torch.full((3,), 7.0), quant_method=None)

    def complete(layer, loaded, total, kernel=({"scale": old}, {})):
        layer.scale = torch.full((3,), 7.0)
        info = SimpleNamespace(kernel_tensors=kernel, load_numel=loaded, load_numel_total=total)
        cpu._complete(lambda layer, info: None)(layer, info)
        return layer.scale.tolist()

    assert complete(layer, 2, 3) == [1.0] * 3
    assert complete(layer, 3, 3) == complete(layer, 0, 3, None) == [7.0] * 3  # all weights come; the first load
    layer.quant_method = SimpleNamespace(moe_kernel=object())
    with pytest.raises(UnsupportedFeature, match="weights.cpu_complete: .*reload_weights"):
        complete(layer, 2, 3)
    layer.quant_method = None
    monkeypatch.setattr(quantized, "has_route", lambda held: held is layer)
    assert complete(layer, 3, 3) == [7.0] * 3
    with pytest.raises(UnsupportedFeature, match="weights.cpu_complete: .*reload_weights"):
        complete(layer, 2, 3)  # vLLM frees the packed weight of such a layer, so nothing holds the rest


def test_packed_experts_may_be_written_by_a_load_only():

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w13_weight, self.w2_weight = (torch.nn.Parameter(torch.randn(2, 8, 4)) for _ in range(2))

    def setup(self, layer):
        self.moe_kernel = SimpleNamespace(fused_experts=SimpleNamespace(process_weights_after_loading=pack))

    def pack(layer):
        with torch.no_grad():
            layer.w13_weight.copy_(layer.w13_weight.flip(0))

    method, model = SimpleNamespace(moe_kernel=None), torch.nn.Sequential(torch.nn.Identity(), Layer())
    load = cpu._pack_experts(setup)
    load(method, model[1])
    cpu._unwritten(model)
    model[1].w2_weight.data.copy_(model[1].w2_weight.flip(0))
    with pytest.raises(UnsupportedFeature, match="weights.cpu_experts: the experts of 1 .*reload_weights"):
        cpu._unwritten(model)
    load(method, model[1])
    cpu._unwritten(model)


def test_a_reload_keeps_its_folder_but_for_a_folder_of_sync():
    config = SimpleNamespace(model="started", model_weights="bucket", revision="main")

    def load(self, weights_path):
        config.model, config.model_weights, config.revision = weights_path, "", None
        if weights_path.endswith("bad"):
            raise OSError("half of it")

    runner = SimpleNamespace(vllm_config=SimpleNamespace(model_config=config), get_model=torch.nn.Module)
    reload = seams._reload(load)
    with samplers.written([("a", torch.ones(1))]) as folder:
        reload(runner, str(folder))
    assert vars(config) == {"model": "started", "model_weights": "bucket", "revision": "main"}
    with pytest.raises(OSError, match="half of it"):
        reload(runner, f"/tmp/{files.HANDED_OVER}bad")
    assert config.model == "started" and weights.pending
    reload(runner, "other")
    assert vars(config) == {"model": "other", "model_weights": "", "revision": None}


class Layers(torch.nn.Sequential):
    def load_weights(self, given):
        for parameter in given:
            parameter.weight_loader(parameter, torch.ones_like(parameter, device="cpu"))


@pytest.mark.parametrize("loaded", [0, 1, 2], ids=["nothing", "a part of a layer", "a layer"])
def test_a_reload_that_fails_half_way_stops_the_engine(loaded):
    """With vLLM's own layerwise load. A load that wrote nothing, as of a wrong folder, can be made again."""
    from vllm.model_executor.model_loader.reload import layerwise

    model = Layers(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    layerwise.record_metadata_for_reloading(model)
    weights.watch_model(model)

    def fails(self):
        layerwise.initialize_layerwise_reload(model)
        model.load_weights(list(model.parameters())[:loaded])
        raise OSError("the network failed")

    runner = SimpleNamespace(vllm_config=SimpleNamespace(model_config=SimpleNamespace(model="")))
    runner.get_model = lambda: model
    with pytest.raises(OSError, match="the network failed"):
        seams._reload(fails)(runner)
    assert weights.pending
    weights.told()
    if loaded:
        with pytest.raises(WeightsBroken, match="Layers failed half way.*OSError: the network failed"):
            weights.settle()
    else:
        weights.settle()


@pytest.mark.parametrize("goes_on", [False, True])
def test_an_update_in_several_calls_that_fails_half_way_stops_the_engine(goes_on, monkeypatch):
    """vLLM ends such an update if a part of it fails, but not if another call does."""
    from vllm.model_executor.model_loader.reload import layerwise

    model = Layers(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    layerwise.record_metadata_for_reloading(model)
    weights.watch_model(model)
    monkeypatch.setattr(seams.active, "plan", SimpleNamespace(platform="cuda"))
    worker = SimpleNamespace(_weight_update_active=True)
    config = SimpleNamespace(model_config=SimpleNamespace(quantization=None), lora_config=None)
    core = SimpleNamespace(model_executor=SimpleNamespace(collective_rpc=lambda call: call(worker)), vllm_config=config)
    run = seams._calls(lambda self, method: method(worker))

    def fails(worker):
        worker._weight_update_active = goes_on
        raise OSError("the network failed")

    run(core, lambda worker: layerwise.initialize_layerwise_reload(model))
    run(core, lambda worker: model.load_weights(list(model.parameters())[:1]))
    with pytest.raises(OSError, match="the network failed"):
        run(core, fails)
    if goes_on:
        weights.settle()
    else:
        with pytest.raises(WeightsBroken, match="Layers failed half way"):
            weights.settle()


@pytest.mark.parametrize(
    ("whose", "loaded", "stops"),
    [("draft", 0, True), ("draft", 2, True), ("draft", 3, True), ("target", 0, False), ("target", 2, True)],
    ids=["drafts, nothing", "drafts, the shared layer", "drafts, and a part", "target, nothing", "target, a layer"],
)
def test_an_update_of_drafts_that_share_a_layer_with_the_target(whose, loaded, stops, monkeypatch):
    """vLLM gives a draft model the embeddings and the head of its target. An update of the drafts that fails after the
    shared layer leaves a target that is neither old nor new."""
    from vllm.model_executor.model_loader.reload import layerwise

    shared = torch.nn.Linear(2, 2)
    models = {"target": Layers(shared, torch.nn.Linear(2, 2)), "draft": Layers(shared, torch.nn.Linear(2, 2))}
    for model in models.values():
        layerwise.record_metadata_for_reloading(model)
    weights.watch_model(models["target"])
    monkeypatch.setattr(seams.active, "plan", SimpleNamespace(platform="cuda"))
    runner = SimpleNamespace(get_draft_model=lambda: models["draft"])
    worker = SimpleNamespace(_weight_update_active=False, model_runner=runner)
    config = SimpleNamespace(model_config=SimpleNamespace(quantization=None), lora_config=None)
    core = SimpleNamespace(model_executor=SimpleNamespace(collective_rpc=lambda call: call(worker)), vllm_config=config)

    def fails(worker):
        layerwise.initialize_layerwise_reload(models[whose])
        models[whose].load_weights(list(models[whose].parameters())[:loaded])
        raise OSError("the network failed")

    with pytest.raises(OSError, match="the network failed"):
        seams._calls(lambda self, method: method(worker))(core, fails)
    if stops:
        with pytest.raises(WeightsBroken, match="Layers failed half way"):
            weights.settle()
    else:
        weights.settle()


def test_a_load_of_its_own_that_fails_half_way_can_be_made_again(monkeypatch):
    """A call of model.load_weights outside of vLLM's updates, as docs/rl.md says."""

    class Plain(torch.nn.Linear):
        def load_weights(self, given):
            for name, value in given:
                self.get_parameter(name).data.copy_(value)

    def half():
        yield "weight", torch.ones(2, 2)
        raise OSError("the network failed")

    model = Plain(2, 2)
    weights.watch_model(model)
    monkeypatch.setattr(seams.active, "plan", SimpleNamespace(platform="cuda"))
    config = SimpleNamespace(model_config=SimpleNamespace(quantization=None), lora_config=None)
    core = SimpleNamespace(model_executor=SimpleNamespace(collective_rpc=lambda call: call(None)), vllm_config=config)
    run, identity = seams._calls(lambda self, method: method(None)), weights.identity()
    with pytest.raises(OSError, match="the network failed"):
        run(core, lambda worker: model.load_weights(half()))
    weights.ready()
    assert not weights.pending and weights.identity() != identity


class Cores:
    """A double of vLLM's client of three engine cores, of which some fail."""

    core_engines = (0, 1, 2)

    def __init__(self, failing):
        self.failing, self.calls = failing, []

    async def _call_utility_async(self, method, *args, engine):
        self.calls.append((method, args, engine))
        if engine in self.failing and args[0] != seams.SPLIT:
            raise OSError(f"no file on node {engine}")
        return f"of {engine}"


@pytest.mark.parametrize(
    ("failing", "method", "split"),
    [((), "update", False), ((1,), "update", True), ((0, 1, 2), "update", False), ((1,), "list_loras", False)],
    ids=["none", "one", "every", "reads"],
)
def test_a_write_that_fails_in_one_engine_core_alone_stops_all(failing, method, split):
    """The load of the front end decides which engine core serves a request."""

    async def original(self, method, *args):
        return (await asyncio.gather(*(self._call_utility_async(method, *args, engine=e) for e in (0, 1, 2))))[0]

    client = Cores(failing)
    call = replicas._every_core(original)(client, "collective_rpc", method, None, (), {})
    if failing:
        with pytest.raises(OSError, match=f"no file on node {failing[0]}"):
            asyncio.run(call)
    else:
        assert asyncio.run(call) == "of 0"
    told = [("collective_rpc", (seams.SPLIT,), engine) for engine in (0, 1, 2)]
    assert client.calls[3:] == (told if split else [])


def test_other_calls_to_engine_cores_are_vllms():
    async def original(self, method, *args):
        return method, args

    assert asyncio.run(replicas._every_core(original)(None, "reset_prefix_cache", 1)) == (
        "reset_prefix_cache",
        (1,),
    )


def test_an_engine_core_with_other_weights_computes_no_more(monkeypatch):
    model = Layers(torch.nn.Linear(2, 2))
    weights.watch_model(model)
    monkeypatch.setattr(seams.active, "plan", SimpleNamespace(platform="cpu"))
    core = SimpleNamespace(model_executor=SimpleNamespace(collective_rpc=lambda call: call(None)))
    seams._calls(None)(core, seams.SPLIT)
    with pytest.raises(WeightsBroken, match="failed in one data-parallel engine core alone"):
        weights.ready()
