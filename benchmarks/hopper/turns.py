"""Measures the cost of small models with engines of several modes in turns on one GPU.

    PYTHONPATH=. python3 benchmarks/hopper/turns.py [--model Llama-3.2-1B] [--repeats 5]

A decode step of a small model is mostly the host's time. The host's time drifts by tens of percent from minute to
minute and from process to process. So the engines run at once, and each repeat of one engine is followed by the same
repeat of the others. The drift then affects all engines. Each engine has a fixed KV cache, and all must fit on the
GPU: for 8B models, give --kv-gib 12, and --only with workloads that fit into this cache.
"""

import queue
import subprocess
import sys
import threading
import time

import run
from child import workloads

START_S, REPEAT_S = 300, 120
NOTE = "Engines in turns on one GPU. (GPU): the kernels' time alone, from one profile of 16 steps"


class Child:
    """One engine's process. The process measures a workload when `measure` asks for it."""

    def __init__(self, a, mode: str, *flags: str):
        self.mode, self.answers = mode, queue.Queue()
        # A fixed KV cache: vLLM's measurement of free memory would be wrong while the other engine starts.
        memory = {"kv_cache_memory_bytes": a.kv_gib << 30, "gpu_memory_utilization": getattr(a, "share", 0.4)}
        self.out, command = run.engine(a, a.model, mode, "--turns", *flags, **memory)
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
        """Wait for the answer `wanted`. Raises RuntimeError for another answer or if the child ends, and queue.Empty
        after `seconds` seconds."""
        if (said := self.answers.get(timeout=seconds)) != wanted:
            raise RuntimeError(f"{self.mode}: {said}, not {wanted}")

    def measure(self, name: str, repeat: int) -> None:
        self.process.stdin.write(f"{name}\t{repeat}\n")
        self.process.stdin.flush()
        self.wait("turn done", REPEAT_S)

    def finish(self) -> None:
        """End the child. Raises RuntimeError if the child fails, for example because it cannot write its file."""
        self.process.stdin.close()
        if code := self.process.wait(60):
            raise RuntimeError(f"{self.mode}: ended with {code}")


def main() -> None:
    parser = run.options(__doc__)
    parser.add_argument("--model", default="Llama-3.2-1B", help="a name of SHAPES")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--modes", default="stock,armed", help="upstream: upstream's own mode")
    parser.add_argument("--only", help="comma-separated workloads")
    parser.add_argument("--kv-gib", type=int, default=24, help="KV cache of each engine")
    parser.add_argument("--share", type=float, default=0.4, help="of the GPU's memory that must be free at each start")
    parser.add_argument("--seconds", type=float, help="begin no further workload after so many seconds")
    a = parser.parse_args()
    begin = time.monotonic()
    children = [Child(a, mode) for mode in a.modes.split(",")]
    try:
        for child in children:
            child.wait("turn ready", START_S)
        for name in workloads(a.only, a.max_model_len):
            if a.seconds and time.monotonic() - begin > a.seconds:
                print(f"no time for {name}", flush=True)
                continue
            for repeat in range(a.repeats):
                # The engines take turns to go first, so that neither engine always runs right after the other.
                for child in children[:: 1 if repeat % 2 == 0 else -1]:
                    child.measure(name, repeat)
        for child in children:
            child.finish()
    finally:
        for child in children:
            child.process.kill()
    if not run.report(a, [child.out for child in children], NOTE):
        sys.exit("no result file was written")


if __name__ == "__main__":
    main()
