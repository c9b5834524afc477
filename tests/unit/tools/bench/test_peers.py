"""benchmarks/hopper/peers.py: ranks that read the same lines, and end together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOPPER = Path(__file__).parents[4] / "benchmarks/hopper"
RANK = """
import os, sys, time
import peers

out, rank = peers.fork(3, sys.argv[1]), os.environ["RANK"]
print(rank, os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], out, flush=True)
for line in peers.lines():
    print(rank, line.strip(), flush=True)
    if line.strip() == f"fail {rank}":
        sys.exit("a rank failed")
    if line.strip() == "end":
        break
while rank == "0" and not all("end" in open(f"{out}.rank{other}.log").read() for other in (1, 2)):
    time.sleep(0.02)  # the others end with rank 0
"""


@pytest.mark.parametrize(("last", "code"), [("end", 0), ("fail 2", 1), ("fail 0", 1)])
def test_ranks_read_the_same_lines_and_end_together(tmp_path, last, code):
    (tmp_path / "rank.py").write_text(RANK)
    out = tmp_path / "out.json"
    command = [sys.executable, "-P", tmp_path / "rank.py", out]
    environ = os.environ | {"PYTHONPATH": str(HOPPER)}
    with subprocess.Popen(command, env=environ, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as ran:
        ran.stdin.write(f"first\n{last}\n")
        ran.stdin.flush()  # it stays open, so a rank that waits would wait for ever
        said = ran.stdout.read()
        assert ran.wait(600) == code
    assert said.startswith(f"0 0 3 {out}\n0 first\n")
    assert ("a rank failed" in said) == (last == "fail 2")  # rank 0 shows why another rank ended
    for rank in ("1", "2") if last == "end" else ():
        log = Path(f"{out}.rank{rank}.log")
        assert log.read_text() == f"{rank} {rank} 3 {out}.rank{rank}\n{rank} first\n{rank} end\n"
