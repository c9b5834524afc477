"""Weight updates on the CPU engine: with new weights, it answers as an engine that was started with them."""

import functools
import os

import msgspec
import pytest

from bi_patch.tools.faults import catch, every
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.models import recipes
from bi_patch.tools.verify import checkpoint, updates
from bi_patch.tools.verify.answers import Answer, NotComparable, compare
from bi_patch.tools.verify.case import Update
from bi_patch.tools.verify.child import ARMED, PATIENT, ChildEngine
from bi_patch.tools.verify.engine import Options
from bi_patch.tools.verify.instruments import InFlight
from bi_patch.tools.verify.probes import FEATURE_PROBES, updating

pytestmark = pytest.mark.engine

PROBE = next(probe for probe in FEATURE_PROBES if probe.name == catch.UPDATE)
FAULTS = [fault.name for fault in every() if fault.axis == catch.UPDATE]


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """folder(name): a recipe's model whose head is its embedding, in bf16."""
    return functools.cache(
        lambda name: str(checkpoint.write(model(name), 3, tmp_path_factory.mktemp(name) / "A", tied=True))
    )


def options(folder: str, **changes) -> Options:
    return Options(folder, max_model_len=1024, chunk=512, **changes)


def axis(given: Options, kind=ChildEngine, further=lambda engine, load: None):
    """The cases of the axis: an engine with the weights, and an engine with others that gets them and goes back."""
    environ = PATIENT | os.environ
    with ChildEngine(ARMED, given, environ=environ) as engine:
        load = catch.workload(engine)
        assert not PROBE.missing(engine)
        change, requests = PROBE.changes(engine)[0], PROBE.requests(engine, load)
        expected = PROBE.collect(engine, load)
    with kind(ARMED, given.but(**change.options), environ=environ) as engine:
        got = PROBE.collect(engine, load, change)
        further(engine, load)
    return list(PROBE.cases(change, requests, expected, got))


def test_updates_of_experts_and_of_a_tied_head(folder):
    """Eager: each way to and fro, on a warm cache; memory; marks; a part of a layer; faults, each caught and named."""

    def further(engine, load):
        _in_flight(engine, PROBE.requests(engine, load)[-1].but(max_tokens=8))
        _in_place(engine, PROBE.requests(engine, load))
        for name in FAULTS:
            found = catch.catch(engine, name, load)
            print(f"{name}: {found.named}")
            assert found.caught and found.right, found

    cases = axis(options(folder(recipes.MOE)), FaultyEngine, further)
    assert len(cases) == 4 * 2 * len({case.label.split("request ")[1] for case in cases})
    assert not [f"{case.label}: {case.difference.first}" for case in cases if case.differs]


def _first(engine) -> str:
    """The folder of the weights that the engine was not started with."""
    return next(model for model, held in updating._folders.items() if held.name == engine.options.model)


def _in_flight(engine, request):
    """An answer over an update says so, and leaves nothing for a request that comes after the update."""
    update = InFlight(Update(updates.RELOAD, _first(engine)), [request, request.but(delay=5)])
    data = engine.ask("update in flight", msgspec.msgpack.encode(update))
    spanning, later = msgspec.msgpack.decode(data, type=list[Answer])
    assert spanning.weights_changed and not later.weights_changed
    with pytest.raises(NotComparable, match="weights changed"):
        compare(spanning, later)
    engine.reset_cache()
    assert not compare(later, engine.generate([request])[0]).differing
    engine.ask("update", msgspec.msgpack.encode(Update(updates.RELOAD, engine.options.model)))


def _in_place(engine, asked):
    """On CPU, embeddings, norms and heads can be written in place. The packed head follows `weights_changed`."""
    own, first = engine.options.model, _first(engine)
    known = engine.generate(asked)
    for folder in (first, own, first):  # the first two reload what the others write
        engine.ask("update", msgspec.msgpack.encode(Update(updates.COPY, folder)))
    assert all(compare(a, b).differing for a, b in zip(known, engine.generate(asked)))
    engine.ask("update", msgspec.msgpack.encode(Update(updates.COPY, own)))
    assert not any(compare(a, b).differing for a, b in zip(known, engine.generate(asked)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [recipes.QWEN3, recipes.MOE])
def test_compiled_code_serves_new_weights(folder, name):
    cases = axis(options(folder(name), eager=False))
    assert cases and not [f"{case.label}: {case.difference.first}" for case in cases if case.differs]
