"""Engines that are measured in turns: all start side by side, and times are taken once none starts any more.

A start is the processor's time: imports, compilation, capture of graphs. Its times would disturb every measurement, so
`ready` waits for all groups, and ends the engines that are late. Then one model after the other has the GPU to itself:
the other engines wait for their input.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nursery import Nursery

START_S, REPEAT_S, END_S = 300, 120, 30
ALL = range(1 << 30)
COMPARED = frozenset({"stock", "armed"})
_FAILED = re.compile(r"the certificate of .* failed.*")


class Child:
    """One engine's process. It says "turn ready", and then "turn done" after each measurement that `measure` asks for.

    out: the file in which the process keeps what it measured.
    """

    def __init__(self, nursery: Nursery, model: str, mode: str, command: Sequence[str], out: Path) -> None:
        self.model, self.mode, self.out = model, mode, out
        self.lines: deque[str] = deque(maxlen=400)
        self._answers: queue.Queue[str] = queue.Queue()
        theirs, ours = os.pipe()
        output, writes = os.pipe()
        self._input = os.fdopen(ours, "w")
        self.process = nursery.fork(command, theirs, writes)
        os.close(theirs)
        os.close(writes)
        threading.Thread(target=self._read, args=(output,), daemon=True).start()

    def _read(self, output: int) -> None:
        with os.fdopen(output, errors="replace") as lines:
            for line in lines:
                if line.startswith("turn "):
                    self._answers.put(line.strip())
                else:
                    self.lines.append(line)
        self._answers.put("ended")

    def wait(self, wanted: str, seconds: float) -> None:
        """Wait for the answer `wanted`. Raises RuntimeError for another answer, if the process ends, and after
        `seconds` seconds."""
        try:
            said = self._answers.get(timeout=max(0.01, seconds))
        except queue.Empty:
            raise RuntimeError(f"{self}: not {wanted!r} in {seconds:.0f} s") from None
        if said != wanted:
            raise RuntimeError(f"{self}: {said!r}, not {wanted!r}")

    def measure(self, name: str, repeat: int) -> None:
        """Measure one repeat of the workload `name`. Raises RuntimeError as `wait` does, and OSError."""
        self._input.write(f"{name}\t{repeat}\n")
        self._input.flush()
        self.wait("turn done", REPEAT_S)

    def failed_certificates(self) -> list[str]:
        """The warnings of the engine's log that a certificate failed, each in one line."""
        found = (_FAILED.search(line) for line in list(self.lines))
        return list(dict.fromkeys(f"{self}: {each[0][:300]}" for each in found if each))

    def kill(self) -> None:
        """End the process, its other ranks and compilers, and wait until they are gone, so that their memory and the
        processor are free. What bi_patch logged there is kept beside `out`, in a file that ends with .log."""
        import psutil

        if said := [line for line in list(self.lines) if "bi_patch" in line]:
            self.out.with_suffix(".log").write_text("".join(said))

        try:
            held = psutil.Process(self.process)
            left = [held, *held.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        until = time.monotonic() + END_S
        while left and time.monotonic() < until:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)
            left = [process for process in left if _runs(process)]
        if left:
            print(f"{self}: processes are left: {left}", flush=True)

    def __str__(self) -> str:
        return f"{self.model} {self.mode}"


@dataclass
class Group:
    """The engines of one model, each in another mode, and what they measure: `repeats` times each workload."""

    children: list[Child]
    workloads: Sequence[str]
    repeats: int
    missing: list[str] = field(default_factory=list)  # what did not start or failed, in words
    failed: bool = False  # an engine did not answer: the group measures nothing more

    def kill(self) -> None:
        for child in self.children:
            child.kill()

    @property
    def files(self) -> list[Path]:
        """The files of the engines that measured something."""
        return [child.out for child in self.children if child.out.is_file()]


def ready(groups: Sequence[Group], deadline: float, needed: frozenset[str] = COMPARED) -> list[Group]:
    """The groups whose engines of all modes in `needed` are ready before `deadline`, a time of time.monotonic().

    Every other engine is ended. Upstream's mode does not run every model: its engine may be missing. A certificate that
    failed lets another kernel serve, so the group names it as missing, too.
    """
    started = []
    for group in groups:
        for child in list(group.children):
            try:
                child.wait("turn ready", deadline - time.monotonic())
                for failed in child.failed_certificates():
                    print(failed, flush=True)
                    group.missing.append(failed)
            except RuntimeError as error:
                print(f"not ready: {error}", flush=True)
                group.missing.append(f"{child.model}: no engine of mode {child.mode} started")
                group.children.remove(child)
                child.kill()
                _tell(child)
        if needed & {child.mode for child in group.children} == needed:
            started.append(group)
        else:
            group.kill()
    return started


def measure(group: Group, until: float = float("inf"), repeats: range = ALL) -> None:
    """Measure a group's workloads; none begins after `until`. An error ends the group, which keeps what it has.

    repeats: which of the group's.
    """
    if group.failed:
        return
    try:
        for name in group.workloads:
            for repeat in range(repeats.start, min(repeats.stop, group.repeats)):
                if time.monotonic() > until:
                    print(f"no time for {group.children[0].model} {name}", flush=True)
                    return
                # The engines take turns to go first, so that none always runs right after the same other one.
                for child in group.children[:: 1 if repeat % 2 == 0 else -1]:
                    child.measure(name, repeat)
    except (RuntimeError, OSError) as error:
        print(f"failed: {error}", flush=True)
        group.failed = True
        group.missing.append(f"{error}")
        for child in group.children:
            _tell(child)


def _runs(process) -> bool:
    """Whether a psutil.Process still computes. A zombie holds nothing; nobody may wait for it."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _tell(child: Child) -> None:
    print(f"--- the last lines of {child}:\n{''.join(list(child.lines)[-25:])}", flush=True)
