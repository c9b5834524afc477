"""Loads the CPU kernels once for the tests of this folder."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="session")
def isa(cache):
    """The ISA of the kernels that this process has loaded."""
    from bi_patch.kernels.cpu import load

    return load(cache)


@pytest.fixture(scope="session")
def ops(isa):
    return torch.ops.bi_cpu


@pytest.fixture(autouse=True)
def threads():
    """Use one thread unless the test sets more; restore the number of threads after the test.

    Most tests make thousands of tiny calls, for which several threads only wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def answers(cache, tmp_path_factory):
    """answers(isa, *flags, quick=False): the output of answers.py for an ISA (None: the best) and compiler flags.

    quick: a library that only tests load is compiled with -O1, in half the time. Optimizations change no bit of it.
    """
    compiler = tmp_path_factory.mktemp("compiler") / "g++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX") or "g++"} "$@" -O1\n')
    compiler.chmod(0o755)

    @functools.cache
    def run(isa: str | None = None, *flags: str, quick: bool = False) -> dict:
        script = Path(__file__).with_name("answers.py")
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        if quick:  # the flag gives the library a name of its own
            environ, flags = environ | {"CXX": str(compiler)}, (*flags, "-DQUICK")
        out = subprocess.run(
            [sys.executable, script, cache, isa or "-", *flags],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert out.returncode == 0, out.stderr[-3000:]
        return json.loads(out.stdout.splitlines()[-1])

    return run
