"""Processes that a benchmark starts: all are waited for or ended, and a failure or a hang is an error."""

import subprocess
import sys

import pytest

from bi_patch.tools.bench import launched


def started(code):
    return subprocess.Popen([sys.executable, "-c", code])


def test_all_end_well():
    launched.wait([started("pass"), started("pass")], 60)


def test_one_fails():
    running = [started("raise SystemExit(3)"), started("pass")]
    with pytest.raises(RuntimeError, match=r"\[3, 0\]"):
        launched.wait(running, 60)


def test_one_hangs_and_is_ended():
    running = [started("pass"), started("import time; time.sleep(600)")]
    with pytest.raises(subprocess.TimeoutExpired):
        launched.wait(running, 0.5)
    assert running[1].wait(60)
