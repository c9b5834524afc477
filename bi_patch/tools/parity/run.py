"""Measures the lines of parity, one after the other, and makes the report. An error or interrupt loses no result."""

from __future__ import annotations

import datetime
import time
import traceback
from collections.abc import Sequence

import msgspec

from bi_patch import installed
from bi_patch.errors import BiPatchError, SettingError, UnsupportedDevice
from bi_patch.tools import provenance
from bi_patch.tools.parity.child import ParityEngine
from bi_patch.tools.parity.plan import LINES, NAMES, Plan
from bi_patch.tools.parity.report import ParityReport
from bi_patch.tools.verify.measure import INTERRUPTED, Watcher
from bi_patch.tools.verify.report import LEFT_OUT, Axis
from bi_patch.tools.verify.system import LocalEngines

_START = 15.0  # seconds until sampler and trainer are ready, on a tiny model


# Arguments of vllm.LLM for a sampler that shares its device with the trainer, by platform. A user's own come first.
SHARED: dict[str, dict[str, object]] = {"cpu": {}, "cuda": {"gpu_memory_utilization": 0.4}}


def shared() -> dict[str, object]:
    """The arguments of SHARED for the installed vLLM. Raises UnsupportedDevice if no trainer exists on its device."""
    found = installed.find()
    if found is None:
        return {}
    if found.platform not in SHARED:
        raise UnsupportedDevice(
            f"parity.device: bi_patch has no trainer on {found.platform}. Use parity with vLLM for CPU or CUDA"
        )
    return SHARED[found.platform]


def measure(
    system: LocalEngines,
    plan: Plan,
    *,
    only: Sequence[str] = (),
    watcher: Watcher | None = None,
    locate: bool = True,
) -> ParityReport:
    """Start the sampler and the trainer, measure the lines (or those in `only`), and return the report.

    Raises SettingError for a line that does not exist.
    """
    for name in only:
        if name not in NAMES:
            raise SettingError(f"parity has no line {name!r}; the lines are {', '.join(NAMES)}")
    watcher = watcher or Watcher()
    report = ParityReport(
        system.name, system.mode, "parity", datetime.datetime.now().isoformat(timespec="seconds"), [], plan=plan
    )
    report.provenance = provenance.here()
    began = time.monotonic()
    axes = {line.name: Axis(line.name, line.about) for line in LINES}
    wanted = [line for line in LINES if not only or line.name in only]
    for line in LINES:
        if line not in wanted:
            axes[line.name].settle(LEFT_OUT, "not asked for")
    try:
        watcher.starting("starting the sampler and the trainer", _START + sum(line.seconds for line in wanted))
        report.starts = 1
        with system.start(system.options, kind=ParityEngine) as engine:
            _describe(report, engine)
            for at, line in enumerate(wanted):
                left = sum(rest.seconds for rest in wanted[at:])
                watcher.measuring(axes[line.name], left)
                axes[line.name] = engine.line(line.name, plan, locate)
                watcher.settled(axes[line.name], left - line.seconds)
            report.runs = engine.runs()
    except KeyboardInterrupt:
        report.stopped = INTERRUPTED
    except BiPatchError as error:
        report.stopped = f"{type(error).__name__}: {error}"
    except Exception as error:
        report.stopped, report.failure = f"{type(error).__name__}: {error}", traceback.format_exc()
    report.axes = list(axes.values())
    report.seconds = time.monotonic() - began
    report.conclude()
    return report


def _describe(report: ParityReport, engine: ParityEngine) -> None:
    info = engine.info
    report.vllm, report.torch, report.device, report.threads = info.vllm, info.torch, info.device, info.threads
    report.open_seams = info.open_seams
    report.options = msgspec.to_builtins(engine.options)
