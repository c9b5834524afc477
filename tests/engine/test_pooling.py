"""Pooling models on the real engine: vectors and scores are bitwise equal alone and in company, offline."""

import os

import pytest

from bi_patch.errors import UnsupportedFeature
from bi_patch.tools.faults import catch, every
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.faults.engines import pooled
from bi_patch.tools.models import pooling
from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.child import ARMED, PATIENT, ChildEngine
from bi_patch.tools.verify.engine import Options
from bi_patch.tools.verify.probes import PROBES, Run, Workload
from bi_patch.tools.verify.probes.base import unpooled

pytestmark = pytest.mark.engine

_QUICK = ("Qwen3-Embedding", "XLM-R reranker", "ModernBERT classifier")
_SLOW = tuple(name for name in pooling.TINY if name not in _QUICK)


def options(name: str, folder, **changes: object) -> Options:
    shape = pooling.POOLING[name]
    length = min(512, int(shape["max_position_embeddings"]) - 2)
    given = Options(
        pooling.write(name, folder),
        max_model_len=length,
        max_num_seqs=64,
        chunk=1024,
        random_weights=7,
        extra=pooling.ARGUMENTS.get(name, {}),
    )
    return given.but(**changes)


def load(engine) -> Workload:
    return Workload.random(
        engine.info.vocab_size, lengths=(3, 40, 300), sizes=(2, 17, 33), filler_lengths=(2, 5, 17, 64), prefix=140
    )


def check(name: str, folder) -> dict[str, int]:
    """Run every axis that applies; returns the numbers compared by axis."""
    compared = {}
    with ChildEngine(ARMED, options(name, folder), environ=PATIENT | os.environ) as engine:
        run = Run(engine, load(engine))
        for probe in PROBES:
            if unpooled(probe, engine) or probe.missing(engine):
                continue
            found = list(probe.cases(run))
            assert not [case.difference.first for case in found if case.differs], probe.name
            compared[probe.name] = sum(case.difference.compared for case in found)
        assert all(compared.values())
    return compared


def test_embeddings_of_a_decoder(tmp_path):
    """The last token's vector, normalized, of any length, in chunks, and with a cached prefix."""
    compared = check("Qwen3-Embedding", tmp_path)
    assert {"prefix cache", "chunk budget", "pooled vectors", "shared prefix"} <= set(compared)


@pytest.mark.parametrize("name", _QUICK[1:])
def test_an_encoder(tmp_path, name):
    """Attention in both directions without a cache, with windows in ModernBERT; its prompts are computed whole."""
    compared = check(name, tmp_path)
    assert "pooled vectors" in compared and not {"prefix cache", "chunk budget"} & set(compared)


@pytest.mark.slow
@pytest.mark.parametrize("name", _SLOW)
def test_another_kind(tmp_path, name):
    assert "pooled vectors" in check(name, tmp_path)


def test_a_sum_over_the_batch_is_caught_and_named(tmp_path):
    with FaultyEngine(ARMED, pooled(str(tmp_path)), environ=PATIENT | os.environ) as engine:
        given = catch.workload(engine)
        assert not any(case.differs for case in catch.cases(engine, catch.POOLED, given))
        for fault in (fault for fault in every() if fault.axis == catch.POOLED):
            found = catch.catch(engine, fault.name, given)
            print(found.named)
            assert found.caught and found.right, found


def test_a_pooler_that_needs_whole_prompts_is_not_cut(refusing, tmp_path):
    given = options("BERT", tmp_path)
    for option in ("enable_chunked_prefill", "enable_prefix_caching"):
        # vLLM starts such an engine with a warning, and may give a pooler a part of the rows.
        with pytest.raises(UnsupportedFeature, match="pooling.cpu_whole: .* needs whole prompts"):
            refusing.refuse(given.but(extra={option: True}))


def test_a_pooler_outside_of_the_list_is_refused(refusing, tmp_path):
    name = "BERT"
    given = options(name, tmp_path)
    with pytest.raises(UnsupportedFeature, match="pooling.cpu: .* the pooler SPLADESparsePooler"):
        refusing.refuse(given.but(extra={"hf_overrides": {"architectures": ["BertSpladeSparseEmbeddingModel"]}}))


def test_a_request_that_is_not_pooled_alone_is_refused():
    """vLLM multiplies the pairs of late interaction together, padded to the longest."""
    from types import SimpleNamespace

    from bi_patch.errors import UnsupportedRequest
    from bi_patch.seams.common import requests

    config = SimpleNamespace(use_v2_model_runner=False, cache_config=SimpleNamespace())
    for params in ({"late_interaction_params": object()}, {"late_chunking_params": object()}):
        with pytest.raises(UnsupportedRequest, match="late"):
            requests.check(config, SimpleNamespace(**params))
    requests.check(config, SimpleNamespace(late_interaction_params=None))
    assert Request((1,), dimensions=4) != Request((1,))
