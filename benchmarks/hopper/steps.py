"""What benchmarks of recurrent kernels share: the time of a call, its CUDA graph, and a file that grows by a step."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable

import torch


def timed(call: Callable[[], object], times: int = 30, mean: bool = False) -> float:
    """Microseconds of a call with the L2 cache flushed: the median of `times` calls, or their mean."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    for _ in range(3):
        call()
    out = []
    for _ in range(times):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        out.append(start.elapsed_time(end) * 1e3)
    return round(sum(out) / times if mean else sorted(out)[times // 2], 1)


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """The replay of a CUDA graph that holds one call. An earlier call compiles what is not compiled yet."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def run(steps: dict[str, Callable[[], dict]], names: Iterable[str], path: str) -> None:
    """Run the steps of these names. Prints what each found, and writes the whole to `path` after each step.

    A step that raises counts as failed: its result is the end of the traceback, and the next step runs.
    """
    found: dict = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    for name in names:
        try:
            with torch.no_grad():
                found[name] = steps[name]()
        except Exception:
            found[name] = {"failed": traceback.format_exc()[-1500:]}
        print(name, json.dumps(found[name]), flush=True)
        with open(path, "w") as file:
            json.dump(found, file, indent=1)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def named(steps: Iterable[str], parts: list[str]) -> list[str]:
    """The steps whose names contain one of `parts`, each once, in the order of `parts`; all steps without parts."""
    return list(dict.fromkeys(name for part in parts or [""] for name in steps if part in name))
