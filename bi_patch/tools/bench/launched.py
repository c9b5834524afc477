"""What an armed engine of several ranks keeps, whichever executor started the ranks: axes and one batch's answers."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Collection, Sequence

import msgspec

from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.probes import PROBES, Workload
from bi_patch.tools.verify.probes.crossing import everything


def kept(engine: LocalEngine, axes: Collection[str]) -> dict:
    """Run verify's axes of these names. Returns, as JSON types, "info" (device and libraries), "answers" of the batch,
    and "rows": axis, compared and differing positions, the first that differs."""
    assert engine.info.mode == "armed" and not engine.info.open_seams, engine.info
    load = Workload.random(
        engine.info.vocab_size, generate=4, sizes=(2, 17, 64), prefix=200, lengths=(3, 40, 290), score_sizes=(17,)
    )
    engine.reset_cache()
    answers = engine.generate(everything(engine, load))
    info = {name: getattr(engine.info, name) for name in ("device", "vllm", "torch", "threads")}
    found = [probe.run(engine, load) for probe in PROBES if probe.name in axes and not probe.missing(engine)]
    rows = [[f.axis, f.compared, f.differing, str(f.first or "")] for f in found]
    return {"info": info, "answers": msgspec.to_builtins(answers), "rows": rows}


def wait(running: Sequence[subprocess.Popen], seconds: float) -> None:
    """Wait for processes, at most so many seconds in all, and end what is left of them.

    Raises RuntimeError if one of them failed, and subprocess.TimeoutExpired if one took too long.
    """
    limit = time.monotonic() + seconds
    try:
        codes = [process.wait(max(0.1, limit - time.monotonic())) for process in running]
    finally:
        for process in running:
            process.kill()
    if any(codes):
        raise RuntimeError(f"the processes ended with {codes}")
