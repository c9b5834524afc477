"""An armed model under FSDP2, on one rank and on two: the bits of the model in one piece, forward and backward."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Dense models: 6, of which each reports 5 lines, and 3 (both ranks) four more. With experts: 2 models of 5 lines. With
# adapters: 2 models of 4 lines.
CASES = 6 * 5 + 3 * 4 + 2 * 5 + (2 * 4 if importlib.util.find_spec("peft") else 0)


@pytest.fixture(scope="module")
def lines(cache, tmp_path_factory):
    """The lines of both ranks."""
    store = tmp_path_factory.mktemp("fsdp") / "store"
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": paths, "BI_PATCH_CACHE": str(cache)}
    command = [sys.executable, str(Path(__file__).with_name("fsdp_ranks.py"))]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(store)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    done = [rank.communicate(timeout=900) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], done[0][1][-3000:] + done[1][1][-1000:]
    return [out.splitlines() for out, _ in done]


@pytest.mark.parametrize("rank", [0, 1])
def test_no_bit_depends_on_the_shards(lines, rank):
    assert len(lines[rank]) == CASES
    assert not [line for line in lines[rank] if not line.startswith("ok ")]
