"""A server with several front ends, measured through HTTP, for parallel.py: any front end may answer a request."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

SECONDS = 240
AXES = ("batch size", "position and order", "mixed lengths", "co-batch contents", "prefix cache")
# vLLM's command asks for the version of the package of its name, which not every environment has.
_VLLM = """
import types, vllm
import vllm.entrypoints.cli.main as command
told = types.SimpleNamespace(version=lambda name: vllm.__version__)
command.importlib = types.SimpleNamespace(metadata=told)
command.main()
"""


@contextlib.contextmanager
def serving(model: str, *options: str) -> Iterator[str]:
    """The address of an armed server of a model's folder. Raises RuntimeError if the server does not start."""
    import psutil

    from bi_patch.arming import children

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", _VLLM, "serve", model, "--host", "127.0.0.1", "--port", port, *options]
    armed = {"VLLM_BATCH_INVARIANT": "1", "BI_PATCH": "1"}
    armed["PYTHONPATH"] = children.python_path(os.environ.get("PYTHONPATH", ""))
    process = subprocess.Popen(command, env=os.environ | armed)
    limit = time.monotonic() + SECONDS
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            if process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"the server of {model} did not start")
            time.sleep(1)
        yield url
    finally:
        tree = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for left in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def measure(label: str, count: int, eager: bool, memory: dict) -> tuple[list, list[str]]:
    """The rows of an armed server with `count` front ends, and what its report lacks. memory: arguments of vllm.LLM."""
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.models import recipes
    from bi_patch.tools.verify import levels
    from bi_patch.tools.verify import measure as verify
    from bi_patch.tools.verify.system import RunningServer

    folder = Path(recipes.path(recipes.QWEN3))
    options = ["--api-server-count", str(count), "--max-model-len", "2048", *(["--enforce-eager"] if eager else [])]
    options += [part for name, value in memory.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    level = replace(levels.LEVELS["quick"], seconds=None, cpu_seconds=None)
    with serving(str(folder), *options) as url:
        report = verify.verify(RunningServer(url), level, only=AXES)
    rows = invariance.rows(label, report)
    for row in rows:
        print(f"{label}: {row.axis}: {row.differing} of {row.compared} differ {row.first}", flush=True)
    return rows, invariance.unmeasured(report)
