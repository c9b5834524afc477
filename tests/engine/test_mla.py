"""MLA on CPU in a real engine: no axis sees anything, and planted faults are caught and named."""

import os

import pytest
import torch

from bi_patch.errors import UnsupportedFeature
from bi_patch.tools.bench import invariance
from bi_patch.tools.faults import catch, engines, latent
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.models import families
from bi_patch.tools.verify import levels, local
from bi_patch.tools.verify.child import ARMED, PATIENT

pytestmark = pytest.mark.engine

# Without AMX, vLLM turns the prefix cache and chunked prefill off for MLA.
AMX = torch.cpu._is_amx_tile_supported()
AXES = ("batch size", *(("prefix cache", "chunk budget") if AMX else ()), "decode = prefill")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return engines.of_family(latent.MODEL, str(tmp_path_factory.mktemp("mla")))


@pytest.fixture(scope="module")
def engine(given):
    with FaultyEngine(ARMED, given, environ=PATIENT | os.environ) as made:
        yield made


def test_without_a_fault_no_axis_sees_anything(engine):
    load = catch.workload(engine)
    for axis in AXES:
        cases = list(catch.cases(engine, axis, load))
        assert cases and not any(case.differs for case in cases), axis


@pytest.mark.parametrize("fault", [f for f in latent.FAULTS if f.axis != catch.PREEMPTION], ids=lambda f: f.name)
def test_a_planted_fault_is_caught_and_named(engine, fault):
    if fault.axis not in AXES and not AMX:
        pytest.skip("without AMX, vLLM turns the prefix cache and chunked prefill off for MLA")
    found = catch.catch(engine, fault.name, catch.workload(engine))
    assert found.caught and found.right, found


def test_preemption(given, engine):
    with FaultyEngine(ARMED, engines.few_blocks(given, engine.info.block_size), environ=PATIENT | os.environ) as small:
        load = catch.workload(small)
        assert not any(case.differs for case in catch.cases(small, catch.PREEMPTION, load))
        for fault in latent.FAULTS:
            if fault.axis == catch.PREEMPTION:
                found = catch.catch(small, fault.name, load)
                assert found.caught and found.right, found


def test_sparse_mla_is_refused_by_name(given, refusing):
    with pytest.raises(UnsupportedFeature, match="sparse MLA"):
        refusing.refuse(given.but(extra={"hf_overrides": {"index_topk": 64}}))


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", ["DeepSeek V2", "DeepSeek V3", "Kimi K2", "GLM-4.7-Flash", "MiniCPM3"])
def test_every_axis(tmp_path, family, eager):
    """All axes of the default level that apply, preemption, restart and compiled code among them."""
    system = local.local(families.write(family, tmp_path), levels.DEFAULT, eager=eager, random_weights=7)
    rows, _ = invariance.measure(family, system, levels.DEFAULT)
    assert {*AXES, "preemption", "restart"} <= {row.axis for row in rows}
    assert not any(row.differing for row in rows), [row for row in rows if row.differing]
