"""The check of the order of sums over ranks, with four real ranks on CPU: two ranks can only agree."""

import json
import subprocess
import sys
from pathlib import Path

from bi_patch.ops import collectives

PROGRAM = Path(__file__).with_name("ranks.py")


def test_lengths_cross_every_power_of_two():
    assert collectives.lengths(1) == [1]
    assert collectives.lengths(10) == [1, 2, 3, 4, 5, 8, 9, 10]


def test_four_ranks(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, PROGRAM, str(r), "4", tmp_path], stdout=subprocess.PIPE, text=True)
        for r in range(4)
    ]
    for number, rank in enumerate(ranks):
        found = json.loads(rank.communicate(timeout=900)[0])
        assert rank.returncode == 0
        assert found["slices_of_the_cuda_seam"] is None and found["slices_of_the_cuda_seam_by_torch"] is None
        assert found["slices_from_the_owner"] == ([1, 1, 1, 1] if number else None), "the first rank's is in rank order"
        assert found["empty slices"] and found["gathered rows"]
        for dtype in ("bfloat16", "float32"):
            assert found[f"in_rank_order {dtype}"] is None
            assert found[f"like_a_ring {dtype}"] == 2
            assert found[f"by_size {dtype}"] == 17
            assert found[f"of_gloo {dtype}"] is not None, "gloo adds in a ring, too"
            for seam in ("of_the_cpu_seam", "of_the_cuda_seam", "of_the_cuda_seam_by_torch"):
                assert found[f"{seam} {dtype}"] is None
                assert found[f"{seam} {dtype} by rank"] is None
            assert found[f"in_rank_order {dtype} by rank"] is None
            assert found[f"by_size {dtype} by rank"] == 17
            assert found[f"like_a_ring {dtype} by rank"] == 1
