"""Checkpoints of a run of GRPO: a later call, with an engine of its own, goes on with the same bits."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from bi_patch import identity
from bi_patch.errors import SettingError
from bi_patch.ops import bits
from bi_patch.tools.parity.plan import Spent, Step

if TYPE_CHECKING:
    from bi_patch.tools.parity.session import Session

# Fields of a plan that decide no bit of a step.
_FREE = ("steps", "micro", "seats", "folder", "seconds", "updates", "cuts", "fault")


class _Told(msgspec.Struct):
    """One line of the file of progress."""

    at: int
    step: Step
    spent: Spent


class Checkpoint:
    """The checkpoint of one run in the plan's folder, and its file of progress. Without a folder, nothing is kept."""

    def __init__(self, session: Session, micro: int, seats: int) -> None:
        self._folder = Path(session.plan.folder) if session.plan.folder else None
        self._name = name(micro, seats)
        self._of = _decides(session) | {"micro": micro, "seats": seats}

    def load(self, masters: dict[str, torch.Tensor], optimizer) -> tuple[list[Step], list[Spent], int]:
        """Write a kept run into the master weights and the optimizer, in place.

        Returns its steps, their seconds, and the number of calls, this one included. Raises SettingError for a
        checkpoint of another run.
        """
        if self._folder is None or not self._file().is_file():
            return [], [], 1
        held = torch.load(self._file(), map_location="cpu", weights_only=True)
        for key, value in self._of.items():
            if held["of"].get(key) != value:
                raise SettingError(
                    f"the checkpoint {self._file()} is of another run: {key} is {held['of'].get(key)!r} there and "
                    f"{value!r} here. Give another folder"
                )
        for key, master in masters.items():
            master.copy_(held["masters"][key])
        optimizer.load_state_dict(held["optimizer"])
        steps, spent = msgspec.json.decode(held["steps"], type=tuple[list[Step], list[Spent]])
        if checksum(masters) != steps[-1].masters:
            raise SettingError(f"the checkpoint {self._file()} is damaged: its weights are not those of its last step")
        return steps, spent, held["calls"] + 1

    def save(self, steps, spent, calls: int, masters, optimizer) -> None:
        """Keep the run as it is after its last step. A reader sees the old file or the new one."""
        if self._folder is None or not steps:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        made = self._file().with_suffix(f".{os.getpid()}")
        kept = {"of": self._of, "calls": calls, "steps": msgspec.json.encode((steps, spent)), "masters": masters}
        torch.save(kept | {"optimizer": optimizer.state_dict()}, made)
        os.replace(made, self._file())

    def tell(self, at: int, step: Step, spent: Spent) -> None:
        """Add a step to the file of progress."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"{self._name}.jsonl").open("ab") as file:
                file.write(msgspec.json.encode(_Told(at, step, spent)) + b"\n")

    def _file(self) -> Path:
        return self._folder / f"{self._name}.pt"


def name(micro: int, seats: int) -> str:
    """The name of a run's files, without their endings."""
    return f"grpo-{micro}-{seats}"


def progress(folder: Path, micro: int, seats: int) -> list[_Told]:
    """The steps that a run has told of so far, in all its calls."""
    file = folder / f"{name(micro, seats)}.jsonl"
    whole = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []  # the last line may be half written
    return [msgspec.json.decode(line, type=_Told) for line in whole]


def checksum(masters: dict[str, torch.Tensor]) -> str:
    """A checksum of the bits of all weights, by name: 16 hexadecimal digits, the same on every device."""
    names = sorted(masters)
    found = list(zip(names, bits.checksums(masters[name] for name in names), strict=True))
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _decides(session: Session) -> dict[str, str]:
    """What decides the bits of a run, as text."""
    plan = {k: v for k, v in msgspec.to_builtins(session.plan).items() if k not in _FREE}
    info = session.engine.info
    return {
        "model": Path(session.engine.options.model).name,
        "dtype": str(session.trainer.dtype),
        "digest": identity.digest(),
        "vllm": info.vllm,
        "torch": info.torch,
        "device": info.device,
        **{key: repr(value) for key, value in plan.items()},
    }
