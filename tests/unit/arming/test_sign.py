"""The sign of an armed engine core: what it says, and which engine cores a front end refuses."""

import contextlib
import dataclasses
import logging
from types import SimpleNamespace

import msgspec
import pytest

from bi_patch import identity, running
from bi_patch.arming import process, sign, startup_seams, workers
from bi_patch.errors import SeamOpen, UnsupportedFeature
from bi_patch.ops import certificates
from bi_patch.ops.certificates import Counts
from bi_patch.platforms.releases import BY_PLATFORM
from bi_patch.seams.plan import Plan
from bi_patch.settings import Settings


@pytest.fixture
def state(monkeypatch):
    made = process.State(Settings(), Plan(BY_PLATFORM["cpu"][0], "cpu", (), (), ()), None)
    monkeypatch.setattr(process, "_state", made)
    return made


def signed(**changes):
    agreed = {"instance": "cd456", "model": {"head_dim": 64}}
    made = sign.Sign("0.2.0", identity.digest(), "0.32.0", "cpu", 3, 3, Counts(4, 1, 2), contract=agreed)
    return msgspec.structs.replace(made, **changes)


def message(**fields):
    return msgspec.msgpack.encode({"max_model_len": 5} | fields)


def test_the_engine_core_says_what_is_armed(state, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(sign.table, "untried", lambda config, platform, release: ("fp16 weights",))
    monkeypatch.setattr(sign.contract, "make", lambda *given: {"instance": "ab123", "dtype": "bfloat16"})
    monkeypatch.setattr(running, "contracts", {})
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    counts = [(2, 0, 2, {"linear": 1.0}), (3, 1, 0, {"linear": 0.5, "norm": 0.25})]
    routes = [{"bundled avx2": 4}, {"bundled avx2": 2, "library or bundled avx2": 1}]
    answers = {workers._certificates: counts, workers._routes: routes, workers._failed: [["cuda.x b"], ["cuda.x a"]]}
    with caplog.at_level(logging.INFO, logger="vllm.bi_patch"):
        sign.make(None, SimpleNamespace(collective_rpc=answers.get))
    assert (
        state.engine.certificates == Counts(5, 1, 2, {"linear": 1.0, "norm": 0.25})
        and state.engine.digest == identity.digest()
    )
    assert state.engine.failed == ("cuda.x a", "cuda.x b")
    assert "ATEN_CPU_CAPABILITY=avx2" in state.engine.settings["variables of libraries"]
    assert state.engine.linears == {"bundled avx2": 6, "library or bundled avx2": 1}
    assert running.contracts == {"ab123": state.engine.contract}
    (line,) = caplog.messages
    assert "armed: vLLM 0.32.0 on cpu, 0 of 0 patch points closed" in line
    said = "certificates: 5 passed, 1 failed, 2 of them from the cache, in 1.2 s (linear 1.0, norm 0.2), "
    said += "linears: 6 bundled avx2, 1 library or bundled avx2, digest"
    assert said in line and "untried: fp16 weights" in line
    named = msgspec.structs.replace(state.engine, contract={"kernels": "bi_cpu-amx_bf16-0123"})
    assert "(linear 1.0, norm 0.2), kernels bi_cpu-amx_bf16-0123, linears: 6" in named.words()


def test_the_sign_travels_in_the_ready_message(state, monkeypatch):
    monkeypatch.setattr(running, "contracts", {})

    @dataclasses.dataclass
    class Stock:
        max_model_len: int

    state.engine = signed()
    ready = startup_seams._ready(Stock)
    sent = msgspec.msgpack.encode(ready(max_model_len=7))
    state.engine = None
    sign.take(sent)
    assert state.engine == signed() and running.contracts["cd456"] == signed().contract
    assert msgspec.msgpack.decode(sent, type=Stock) == Stock(7)  # a stock front end reads it, too


@pytest.mark.parametrize(
    "payload, said",
    [
        (b"", "the engine core is not armed"),
        (message(), "the engine core is not armed"),
        (message(bi_patch=None), "the engine core is not armed"),
        (message(bi_patch=msgspec.to_builtins(signed(digest="0123"))), r"armed by another bi_patch \(0123\)"),
        (message(bi_patch={"digest": "4567"}), r"armed by another bi_patch \(4567\)"),
    ],
    ids=["empty", "stock", "not ready", "other code", "other form"],
)
def test_a_front_end_refuses_another_engine_core(state, payload, said):
    with pytest.raises(SeamOpen, match=said):
        startup_seams._front_end(lambda self, payload: None)(None, payload)


def test_a_worker_says_which_certificates_failed(monkeypatch):
    monkeypatch.setattr(certificates, "_failed", {"0": "cuda.x b", "1": "cuda.x a", "2": "cuda.x b"})
    assert workers._failed(None) == ["cuda.x a", "cuda.x b"]


@pytest.mark.parametrize(
    ("first", "other", "said"),
    [
        ({}, {}, ""),
        ({"contract": {"instance": "ab"}}, {"contract": {"instance": "cd"}}, ""),
        ({"certificates": Counts(4, 1, 2)}, {"certificates": Counts(5, 0, 0)}, ""),
        (
            {"contract": {"instance": "ab", "device": "H100"}},
            {"contract": {"instance": "ab", "device": "H200"}},
            "H100",
        ),
        ({"contract": {"torch": "2.13", "mla": "one"}}, {"contract": {"torch": "2.12"}}, "mla .one and None., torch"),
        ({"settings": {"settings": "BI_PATCH_MLA=two"}}, {"settings": {"settings": "BI_PATCH_MLA=one"}}, "MLA=two and"),
        ({"linears": {"library": 3}}, {"linears": {"bundled": 3}}, ""),  # of 16-bit weights: the same bits
        (
            {"linears": {"library": 3}, "contract": {"instance": "ab", "quantization": "awq"}},
            {"linears": {"bundled": 3}, "contract": {"instance": "ab", "quantization": "awq"}},
            "linears",
        ),
        (
            {"failed": ("cuda.products N=1",), "contract": {"instance": "ab", "quantization": "modelopt_fp4"}},
            {"failed": (), "contract": {"instance": "ab", "quantization": "modelopt_fp4"}},
            "failed certificates .*N=1",
        ),
        ({"failed": ("cuda.linear N=1",)}, {}, ""),
    ],
)
def test_data_parallel_engine_cores_decide_bits_alike(state, monkeypatch, first, other, said):
    """The front end's load decides which of them serves a request."""
    monkeypatch.setattr(running, "keep", lambda contract: None)
    client, asked = SimpleNamespace(), []
    take = startup_seams._front_end(lambda self, payload: asked.append(payload))
    for changes in (first, first):
        take(client, message(bi_patch=msgspec.to_builtins(signed(**changes))))
    refused = pytest.raises(
        UnsupportedFeature, match=f"engine.front_end: data-parallel engine cores differ in .*{said}"
    )
    with refused if said else contextlib.nullcontext():
        take(client, message(bi_patch=msgspec.to_builtins(signed(**other))))
    assert len(asked) == (2 if said else 3)
    take(SimpleNamespace(), message(bi_patch=msgspec.to_builtins(signed(**other))))  # another engine's front end


def test_a_front_end_that_is_not_armed_asks_nothing(monkeypatch):
    monkeypatch.setattr(process, "_state", None)
    sign.take(message())
    assert sign.held() is None
