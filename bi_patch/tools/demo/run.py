"""Running the demo: both engines one after the other, with progress, into a report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import msgspec

from bi_patch import arming
from bi_patch.errors import BiPatchError
from bi_patch.tools.demo import cases, prompts
from bi_patch.tools.demo.verdict import Judge, Side, exit_code, sentences
from bi_patch.tools.verify.child import ARMED, PATIENT, STOCK, ChildEngine, EngineFailed
from bi_patch.tools.verify.engine import Info, Options
from bi_patch.tools.verify.probes import HITS

QUICK_SUBJECTS = ("keeper", "harbour", "minutes")


class Report(msgspec.Struct):
    """What the demo found, as its JSON file holds it."""

    model: str
    dtype: str
    vllm: str
    torch: str
    device: str
    threads: int
    prompts: list[str]
    columns: list[str]
    stock: Side
    armed: Side
    verdict: list[str]
    exit_code: int
    seconds: float


class Watcher:
    """Hears what is running; the terminal's progress is one."""

    def begin(self, mode: str) -> None:
        """An engine is starting."""

    def planned(self, mode: str, rounds: int) -> None:
        """The engine is up and will run that many rounds."""

    def running(self, mode: str, about: str) -> None:
        """A round has started."""

    def stopped(self, mode: str, why: str) -> None:
        """The engine has stopped with an error where it is known to; the rounds that are left are not run."""

    def finished(self, mode: str, differing: int) -> None:
        """A round has ended with so many differing positions."""


def run(
    model: str, *, dtype: str = "bfloat16", quick: bool = False, watcher: Watcher | None = None, name: str = ""
) -> Report:
    """Run the demo on a model's folder. Raises what the armed engine refuses with (SeamOpen, ...), or EngineFailed."""
    watch = watcher or Watcher()
    _would_arm()
    options = Options(model, dtype=dtype, max_model_len=2048, max_num_seqs=64, chunk=cases.CHUNK, prefix_caching=True)
    started = time.monotonic()
    stock, info, plan = _side(STOCK, options, quick, watch)
    armed, info, plan = _side(ARMED, options, quick, watch)
    return Report(
        model=name or model,
        dtype=dtype,
        vllm=info.vllm,
        torch=info.torch,
        device=info.device,
        threads=info.threads,
        prompts=list(plan.names),
        columns=list(plan.columns),
        stock=stock,
        armed=armed,
        verdict=sentences(stock, armed),
        exit_code=exit_code(armed),
        seconds=round(time.monotonic() - started, 1),
    )


def _would_arm() -> None:
    """Raise now what arming the second child would raise after minutes: a setting, a release, a platform."""
    if arming.state() is None and arming.arm() is not None:
        arming.disarm()


def _side(mode: str, options: Options, quick: bool, watch: Watcher) -> tuple[Side, Info, cases.Plan]:
    started = time.monotonic()
    watch.begin(mode)
    with ChildEngine(mode, options, environ={**PATIENT, **os.environ}) as engine:
        plan = _plan(engine.encode, quick)
        watch.planned(mode, len(plan.rounds))
        judge = Judge(mode, plan.names)
        judge.side.open_seams = list(engine.info.open_seams)
        for index, current in enumerate(plan.rounds):
            watch.running(mode, current.about)
            try:
                if not current.warm:
                    engine.reset_cache()
                answers = engine.generate([slot.request for slot in current.slots])
            except BiPatchError as error:
                if mode == ARMED or not current.may_stop:
                    raise
                judge.stop(plan.rounds[index:], _reason(error))
                watch.stopped(mode, judge.side.stopped)
                break
            watch.finished(mode, judge.take(current, answers).differing)
        if not judge.side.stopped:
            judge.side.cached_tokens = int(engine.counters().get(HITS, 0))
        judge.side.seconds = round(time.monotonic() - started, 1)
        return judge.side, engine.info, plan


def _plan(encode: Callable[[str], tuple[int, ...]], quick: bool) -> cases.Plan:
    chosen = [s for s in prompts.SUBJECTS if not quick or s.name in QUICK_SUBJECTS]
    return cases.make(
        [s.name for s in chosen],
        [encode(s.text) for s in chosen],
        [encode(text) for text in prompts.FILLERS],
        quick=quick,
        temperature=prompts.TEMPERATURE,
        top_p=prompts.TOP_P,
    )


def _reason(error: BiPatchError) -> str:
    """The first line of an engine's failure, without where its log is."""
    text = str(error).splitlines()[0]
    if isinstance(error, EngineFailed) and error.kind:
        return text.split(f"{error.kind}: ", 1)[-1].split(";")[0] or error.kind
    return text
