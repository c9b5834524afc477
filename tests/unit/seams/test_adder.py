"""NCCL adds large messages of two ranks: its certificate with two real ranks over gloo, and what NCCL then adds."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bi_patch.ops.cuda.ranks import Adder
from bi_patch.seams.cuda import adder, communicator

PROGRAM = Path(__file__).with_name("pair.py")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ELEMENTS = 97 * 40  # of the largest message that the start-up check sends


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    ranks = [
        subprocess.Popen([sys.executable, PROGRAM, str(r), folder], stdout=subprocess.PIPE, text=True) for r in (0, 1)
    ]
    said = [json.loads(rank.communicate(timeout=600)[0]) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return said


@pytest.mark.parametrize("dtype", DTYPES)
def test_nccl_adds_what_exceeds_the_buffer_up_to_the_largest_certified_message(found, dtype):
    most = ELEMENTS * dtype.itemsize
    for rank in found:
        certified, said, sums = rank[str(dtype)]
        assert certified == {str(dtype): most} and not said
        for size, (one_stage, nccl, differing) in sums.items():
            assert (one_stage, nccl) == ((0, 1) if 1024 < int(size) <= most else (1, 0)), size
            assert not differing
        assert str(most) in sums and str(1024) in sums


@pytest.mark.parametrize("way", ["flushed", "without_sign", "of_another_nan", "truncated", "by_size", "of_one_rank"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_bits_on_one_rank_leave_all_sums_to_the_one_stage_all_reduce(found, dtype, way):
    for number, rank in enumerate(found):
        certified, (said,), sums = rank[f"{dtype} {way}"]
        assert certified is None
        why = f"elements in {str(dtype)[6:]}"
        assert ("the other rank said so" if way == "of_one_rank" and not number else why) in said
        assert all((one_stage, nccl, differing) == (1, 0, 0) for one_stage, nccl, differing in sums.values())


def test_pytorchs_nccl_adds_where_vllm_has_none_on_a_rank(found):
    for rank in found:
        certified, said, sums = rank["by PyTorch"]
        assert certified == {"torch.bfloat16": 2 * ELEMENTS} and not said
        for size, (one_stage, nccl, differing) in sums.items():
            assert (one_stage, nccl) == ((0, 0) if 1024 < int(size) <= 2 * ELEMENTS else (1, 0)), size
            assert not differing


@pytest.mark.parametrize(
    "case", ["within the buffer", "off on one rank", "several nodes", "no NCCL on one rank", "gloo", "fp64"]
)
def test_ranks_without_large_messages_or_peer_memory_have_no_certificate(found, case):
    assert all(rank[case] == [None, []] for rank in found)


def test_an_error_of_nccl_stops_the_start(found):
    assert all(rank["failing"] == "no memory" for rank in found)


def test_memory_that_one_rank_lacks_leaves_all_sums_to_the_one_stage_all_reduce(found):
    for rank in found:
        certified, (said,) = rank["no memory on one rank"]
        assert certified is None and "no memory for the check on a rank" in said


def test_other_numbers_of_ranks_make_no_certificate():
    for ranks in (1, 3, 4):
        adder.certify(None, SimpleNamespace(world_size=ranks), None)


def test_memory_that_the_switch_can_add_makes_no_certificate(monkeypatch):
    held = SimpleNamespace(ca_comm=SimpleNamespace(disabled=False, mnnvl_only=False))
    held.pynccl_comm = SimpleNamespace(disabled=False, all_reduce="sum")
    assert adder._by_vllm(held) == "sum"
    monkeypatch.setenv("VLLM_USE_NCCL_SYMM_MEM", "1")
    assert adder._by_vllm(held) is None and adder._by_torch(held) is None


def test_graphs_and_transposed_messages_keep_the_one_stage_all_reduce(monkeypatch):
    made, own = Adder(None, {torch.bfloat16: 4096}), SimpleNamespace(max_size=1024)
    x, capturing = torch.zeros(32, 32).bfloat16(), []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    assert made.serves(x, own)
    assert not made.serves(x.T[:, :31], own) and not made.serves(x.float(), own)
    capturing.append(True)
    assert not made.serves(x, own)


def test_a_worker_makes_the_certificates_before_it_checks_the_sums(monkeypatch):
    made = []
    monkeypatch.setattr(communicator, "_carried", lambda *given: None)
    monkeypatch.setattr(adder, "certify", lambda config, group, carrier: made.append((config, group)))
    communicator._begin("config", "group")
    assert made == [("config", "group")]


def test_messages_above_the_buffer_double_up_to_the_largest_step(monkeypatch):
    asked = [(96, 40, torch.bfloat16), (2, 40, torch.float32), (96, 40, torch.float64)]
    monkeypatch.setattr(adder.ranks, "messages", lambda config, ordered: asked)
    lengths = [513, 1024, 1025, 2048, 2049, 3839, 3840]
    assert adder._lengths(None, 1024) == {torch.bfloat16: lengths}
