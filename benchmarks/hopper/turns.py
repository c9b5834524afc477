"""Cost of small models: stock and armed on one card at once, measured in turns.

    PYTHONPATH=.:$PYTHONPATH python3 benchmarks/hopper/turns.py TAG DATE [--model Llama-3.2-1B] [--repeats 5]

A decode step of a small model is mostly the host's time, which drifts by tens of percent from one minute to the next
and from process to process. Here both engines are alive and each repeat of one is followed by the same of the other,
so that drift meets both. Each has a fixed KV cache, and both must fit on the card: 8B models take --kv-gib 12, and
--only workloads that this holds.
"""

import queue
import subprocess
import threading

import run
from child import workloads

MODES = ("stock", "armed")
START_S, REPEAT_S = 300, 120


class Child:
    """One engine's process, which measures when told."""

    def __init__(self, a, mode: str):
        self.mode, self.answers = mode, queue.Queue()
        # A fixed KV cache: measuring what is free would see the other engine start.
        memory = {"kv_cache_memory_bytes": a.kv_gib << 30, "gpu_memory_utilization": 0.4}
        self.out, command = run.engine(a, a.model, mode, "--turns", **memory)
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
        """Raises RuntimeError where the child could not write what it measured."""
        self.process.stdin.close()
        if code := self.process.wait(60):
            raise RuntimeError(f"{self.mode}: ended with {code}")


def main() -> None:
    parser = run.options(__doc__)
    parser.add_argument("--model", default="Llama-3.2-1B", help="a name of SHAPES")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="comma-separated workloads")
    parser.add_argument("--kv-gib", type=int, default=24, help="KV cache of each engine")
    a = parser.parse_args()
    children = [Child(a, mode) for mode in MODES]
    try:
        for child in children:
            child.wait("turn ready", START_S)
        for name in workloads(a.only, a.max_model_len):
            for repeat in range(a.repeats):
                # Who goes first changes, so that neither always finds the card as the other left it.
                for child in children[:: 1 if repeat % 2 == 0 else -1]:
                    child.measure(name, repeat)
        for child in children:
            child.finish()
    finally:
        for child in children:
            child.process.kill()
    run.report(a, [child.out for child in children])


if __name__ == "__main__":
    main()
