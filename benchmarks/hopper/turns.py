"""Cost of small models: stock and armed on one card at once, measured in turns.

    PYTHONPATH=.:$PYTHONPATH python3 benchmarks/hopper/turns.py TAG DATE [--model Llama-3.2-1B] [--repeats 5]

A decode step of a small model is mostly the host's time, which drifts by tens of percent from one minute to the next
and from process to process. Here both engines are alive and each repeat of one is followed by the same of the other,
so that drift meets both. Each has a fixed KV cache, so both must fit on the card: 8B models need run.py.
"""

import argparse
import queue
import subprocess
import sys
import threading
from pathlib import Path

import models
from child import COST
from run import EXTRA, HERE

MODES = ("stock", "armed")
START_S, REPEAT_S = 300, 120


class Child:
    """One engine's process, which measures when told."""

    def __init__(self, model: str, mode: str, out: Path, extra: str, max_model_len: str):
        self.mode, self.answers = mode, queue.Queue()
        command = [sys.executable, str(HERE / "child.py"), model, mode, str(out), "--turns", "--extra", extra]
        command += ["--max-model-len", max_model_len]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith("turn "):
                self.answers.put(line.strip())
            else:
                print(line, end="", flush=True)
        self.answers.put("ended")

    def wait(self, wanted: str, seconds: int) -> None:
        """Raises RuntimeError where the child ends or says something else, queue.Empty after `seconds`."""
        if (said := self.answers.get(timeout=seconds)) != wanted:
            raise RuntimeError(f"{self.mode}: {said}, not {wanted}")

    def measure(self, name: str, repeat: int) -> None:
        self.process.stdin.write(f"{name}\t{repeat}\n")
        self.process.stdin.flush()
        self.wait("turn done", REPEAT_S)

    def finish(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag")
    parser.add_argument("date")
    parser.add_argument("--model", default="Llama-3.2-1B", help="a name of models.py")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="comma-separated workloads")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--raw", type=Path, default=Path("/tmp/bi_patch-hopper"), help="folder of each engine's file")
    parser.add_argument("--kv-gib", type=int, default=24, help="KV cache of each engine")
    parser.add_argument("--max-model-len", default="33000")
    a = parser.parse_args()
    a.raw.mkdir(parents=True, exist_ok=True)
    # A fixed KV cache: measuring what is free would see the other engine start.
    extra = f'{EXTRA[:-1]}, "kv_cache_memory_bytes": {a.kv_gib << 30}, "gpu_memory_utilization": 0.4}}'
    files = [a.raw / f"{models.short(a.model)}-{mode}.json" for mode in MODES]
    children = [Child(a.model, mode, out, extra, a.max_model_len) for mode, out in zip(MODES, files)]
    try:
        for child in children:
            child.wait("turn ready", START_S)
        for name in a.only.split(",") if a.only else COST:
            for repeat in range(a.repeats):
                # Who goes first changes, so that neither always finds the card as the other left it.
                for child in children[:: 1 if repeat % 2 == 0 else -1]:
                    child.measure(name, repeat)
        for child in children:
            child.finish()
    finally:
        for child in children:
            child.process.kill()
    report = [sys.executable, HERE / "report.py", a.tag, a.date, "--results", a.results, *files]
    subprocess.run([str(part) for part in report], check=True)


if __name__ == "__main__":
    main()
