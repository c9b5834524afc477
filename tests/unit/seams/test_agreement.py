"""Ranks that are not armed alike stop, every one of them, with the reason; real ranks over gloo."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.version import Version

from bi_patch import identity
from bi_patch.arming.catalog import plan
from bi_patch.errors import SeamOpen
from bi_patch.platforms.releases import BY_PLATFORM
from bi_patch.seams import active, agreement

PROGRAM = Path(__file__).with_name("agreeing.py")


def test_three_ranks(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, PROGRAM, str(rank), "3", tmp_path], stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    try:
        found = [json.loads(rank.communicate(timeout=900)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, said in enumerate(found):
        assert said["alike"][0] == ""
        for what, other in (("bi_patch", "4567"), ("settings", "8")):
            assert said[what][0].startswith(f"SeamOpen: communicator.order: 3 ranks differ in {what} (0: ")
            assert f"; 1: {other}). Install the same bi_patch for every rank" in said[what][0]
        assert (
            "UnsupportedFeature: communicator.order: 3 ranks differ in device (0: H200; 1: H100)" in said["device"][0]
        )
        assert said["nothing"] == "" and said["every"] == [True, False]
        assert said["together"] == f"UnsupportedFeature: no route{'' if rank == 1 else ' (rank 1 said this)'}"
        if rank != 1:
            text, seconds = said["not armed"]
            assert text.startswith("SeamOpen: communicator.order: within 5 s, not every one of 3 ranks said")
            assert seconds < 600  # gloo's own limit is half an hour
    # Rank 2 is late, too, where the machine stops its process for SECONDS.
    assert any(f"Ranks {late} failed" in found[0]["not armed"][0] for late in ("1", "1, 2", "2, 1"))


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_rank_says_what_decides_its_bits(platform, monkeypatch):
    monkeypatch.setattr(agreement, "_device", lambda name: f"a {name}")
    monkeypatch.setattr(active, "plan", plan(Version(BY_PLATFORM[platform][-1]), platform))
    monkeypatch.setattr(active, "leaves", 8)
    said = agreement._own()
    assert said["bi_patch"] == identity.digest() and said["device"] == f"a {platform}"
    assert said["vLLM"] == f"{BY_PLATFORM[platform][-1]} for {platform}"
    assert said["settings"] == "BI_PATCH_TP_INVARIANT=8 BI_PATCH_MLA=two"
    name = {"cpu": "ATEN_CPU_CAPABILITY", "cuda": "NVIDIA_TF32_OVERRIDE"}[platform]
    monkeypatch.setenv(name, "avx2")
    monkeypatch.setenv("BI_PATCH_LEAVE_OPEN", "norm.cuda_rows")
    said = agreement._own()
    assert f"{name}=avx2" in said["variables of libraries"] and said["open patch points"] == "norm.cuda_rows"


def test_one_rank_asks_nobody_and_a_process_that_is_not_armed_answers_nothing(monkeypatch):
    one = SimpleNamespace(world_size=1)
    agreement.check("communicator.order", one)
    assert agreement.every(one, True) and not agreement.every(one, False)
    monkeypatch.setattr(active, "plan", None)
    with pytest.raises(SeamOpen):
        agreement._own()


def test_ranks_of_a_cpu_may_have_other_numbers_of_threads():
    assert "threads" not in agreement._device("cpu")
