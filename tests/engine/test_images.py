"""Images on the CPU engine: beside, after and before other images, in several steps, on warm caches."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from bi_patch.errors import UnsupportedFeature
from bi_patch.tools.faults import catch
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.faults.engines import images
from bi_patch.tools.models import quantize, vision
from bi_patch.tools.verify.child import ARMED, STOCK, ChildEngine, EngineFailed
from bi_patch.tools.verify.probes import images as axis

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def engine(folder):
    """An armed engine in fp32 whose model cuts images into tiles."""
    with FaultyEngine(ARMED, images(str(folder))) as made:
        yield made


def differing(engine):
    load = replace(catch.workload(engine), generate=2)  # most of the time goes into generated tokens
    cases = list(catch.cases(engine, catch.IMAGES, load))
    assert len(cases) > 60
    return [f"{case.label}: {case.difference.first}" for case in cases if case.differs]


def test_images_do_not_depend_on_company(engine):
    assert differing(engine) == []


def test_images_in_one_batch_are_caught_and_named(engine):
    found = catch.catch(engine, "images in one batch", catch.workload(engine))
    assert found.caught and found.right, found


def test_requests_without_images_are_invariant_too(engine):
    cases = list(catch.cases(engine, "co-batch contents", catch.workload(engine)))
    assert cases and not any(case.differs for case in cases)


def test_images_that_do_not_fit_are_vllms_own_error(engine):
    """More images than the model's longest prompt holds. The engine goes on, with the same bits."""
    asked = axis.subjects(engine, catch.workload(engine))["one image"]
    before = engine.generate([asked])
    with pytest.raises(EngineFailed, match="longer than the maximum model length|may be provided in one prompt"):
        engine.generate([asked.but(images=asked.images * (engine.options.max_model_len // 8))])
    assert engine.generate([asked]) == before


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", vision.CPU)
def test_kinds_of_encoders(folder, name, eager):
    if name not in vision.WITHOUT_TORCHVISION and not find_spec("torchvision"):
        pytest.skip("vLLM needs torchvision for this model: make test-all installs it")
    given = images(str(folder), "bfloat16").but(model=vision.write(name, folder), eager=eager, digests=eager)
    given = given.but(extra=given.extra | vision.ARGUMENTS.get(name, {}))
    with ChildEngine(ARMED, given) as made:
        assert differing(made) == []


@pytest.mark.parametrize(
    "scheme",
    [quantize.INT8, *(pytest.param(name, marks=pytest.mark.slow) for name in (quantize.AWQ, quantize.GPTQ))],
)
def test_a_quantized_language_model(folder, scheme):
    """With an unquantized encoder, images do not depend on company. A quantized encoder is refused by name."""
    given = images(str(folder), "bfloat16").but(model=vision.write("Idefics3", folder, scheme))
    with ChildEngine(ARMED, given) as made:
        load = replace(catch.workload(made), generate=1)
        cases = [case for _, case in zip(range(24), catch.cases(made, catch.IMAGES, load))]
        assert len(cases) == 24 and not any(case.differs for case in cases)
    file = Path(given.model) / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = quantize.SCHEMES[scheme][1](["lm_head"])
    file.write_text(json.dumps(config))
    with pytest.raises(UnsupportedFeature, match="vision.cpu: .*quantized weights of Idefics3.*encoder"):
        ChildEngine(ARMED, given)


@pytest.mark.slow
def test_a_stock_engine_differs(folder):
    with ChildEngine(STOCK, images(str(folder))) as made:
        assert differing(made)
