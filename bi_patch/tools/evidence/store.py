"""Writing result files, reading them, and choosing the newest for each table."""

from __future__ import annotations

import datetime
import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
from packaging.version import InvalidVersion, Version

from bi_patch.errors import BiPatchError
from bi_patch.files import write_json
from bi_patch.tools import provenance
from bi_patch.tools.evidence.kinds import KINDS, Evidence, Faults, Kind
from bi_patch.tools.provenance import Provenance

RESULTS = Path("benchmarks/results")
ARCHIVE = "archive"  # the folder, at any depth, whose files supply no table
_TRITON = ("triton", "pytorch-triton", "triton-ascend", "triton-cpu")  # names of packages


class EvidenceMissing(BiPatchError):
    """A table or plot was asked for, and no result file of its kind is there."""


class EvidenceUnreadable(BiPatchError):
    """A result file is not JSON, or lacks a field that its kind needs."""


class Measured(Protocol):
    """What a file says of the machine: an engine's Info, or a Report of verify."""

    device: str
    vllm: str
    torch: str
    threads: int


def new(kind: type[Kind], measured: Measured, made_by: Provenance | None = None) -> Kind:
    """A file of this kind without rows, of now. made_by: what measured, where another process did; by default this one.

    Raises nothing: where git cannot be asked, the commit is None.
    """
    now = datetime.datetime.now()
    return kind(
        device=measured.device,
        vllm=measured.vllm,
        torch=measured.torch,
        threads=measured.threads,
        triton=triton_release(),
        date=now.date().isoformat(),
        time=now.time().isoformat(timespec="seconds"),
        **msgspec.structs.asdict(made_by or provenance.here()),
    )


def triton_release() -> str:
    """The release of Triton in this process's environment, "" where there is none."""
    for name in _TRITON:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def file_name(evidence: Evidence) -> str:
    """E.g. cost-2026-11-28-cpu-vllm-0.32.0.json."""
    where = "-".join(filter(None, (evidence.platform, evidence.variant)))
    release = re.sub(r"[^0-9A-Za-z.]+", "-", evidence.vllm)
    return f"{evidence.kind}-{evidence.date}-{where}-vllm-{release}.json"


def write(evidence: Evidence, folder: Path = RESULTS) -> Path:
    """Write the file and return its path; `evidence` is left as it is.

    A file of the same day keeps its rows of other models if the same command of the same bi_patch made it, on the same
    device with the same libraries; a file of faults is replaced as a whole. What differs in one of these gets a file of
    its own, `...-2.json`. Raises OSError, and EvidenceUnreadable for an earlier file that is broken.
    """
    first = folder / file_name(evidence)
    path, number = first, 1
    while path.exists():
        before = read(path, type(evidence))
        if _made_by(before) == _made_by(evidence):
            models = {_model(row) for row in evidence.rows}
            kept = [] if isinstance(evidence, Faults) else [row for row in before.rows if _model(row) not in models]
            evidence = msgspec.structs.replace(evidence, rows=kept + evidence.rows, note=evidence.note or before.note)
            break
        number += 1
        path = first.with_name(f"{first.stem}-{number}{first.suffix}")
    write_json(path, evidence)
    return path


def _made_by(evidence: Evidence) -> tuple:
    """Everything in the head but the time and the note."""
    return tuple(getattr(evidence, name) for name in Evidence.__struct_fields__ if name not in ("time", "note")) + (
        evidence.variant,
    )


def _model(row: msgspec.Struct) -> str:
    return getattr(row, "model", "")


def read(path: Path, kind: type[Kind]) -> Kind:
    """Raises EvidenceUnreadable for a file that is not of this kind, OSError for one that cannot be opened."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.DecodeError as error:
        raise EvidenceUnreadable(f"{path} is no {kind.kind} file: {error}") from error


@dataclass(frozen=True)
class Source:
    """One file, and those of its models that no newer file has: the rows that a table takes from it."""

    path: Path
    evidence: Evidence
    models: tuple[str, ...]

    @property
    def rows(self) -> list:
        return [row for row in self.evidence.rows if _model(row) in self.models]


@dataclass(frozen=True)
class Table:
    """The current rows of one kind, device and release. sources: newest first; each supplies at least one model."""

    kind: type[Evidence]
    device: str
    vllm: str
    variant: str
    sources: tuple[Source, ...]

    @property
    def newest(self) -> Source:
        return self.sources[0]

    @property
    def name(self) -> str:
        """E.g. cost-h100."""
        return "-".join(filter(None, (self.kind.kind, self.newest.evidence.platform, self.variant)))

    @property
    def rows(self) -> list:
        """The rows of the oldest source first, as files get their rows."""
        return [row for source in reversed(self.sources) for row in source.rows]

    @property
    def evidence(self) -> Evidence:
        """The newest file with the rows of all sources."""
        return msgspec.structs.replace(self.newest.evidence, rows=self.rows)


def current(folder: Path = RESULTS) -> dict[str, Table]:
    """Every table by its mark: `cost-h100` for a device's newest release, `cost-h100-vllm-0.26.0` for each release.

    Device, release and date are those that the files hold. A table shows each model as the newest file that measured
    it; of faults, only the newest file. Where two devices have one short name, the mark is of the newer file. Folders
    below are read too, except archive. Raises EvidenceMissing where there is no file, EvidenceUnreadable for a broken
    file.
    """
    marks: dict[str, Table] = {}
    for table in sorted(_tables(folder), key=lambda t: (_release(t.vllm), _age(t.newest.path, t.newest.evidence))):
        marks[table.name] = marks[f"{table.name}-vllm-{table.vllm}"] = table
    if not marks:
        raise EvidenceMissing(f"{folder} holds no result files: run `bi-patch bench` first")
    return dict(sorted(marks.items()))


def superseded(folder: Path = RESULTS) -> list[Path]:
    """Files that supply no table, since newer files have all their models. Raises as `current` does."""
    used = {source.path for table in _tables(folder) for source in table.sources}
    return [path for kind in KINDS for path in _files(kind, folder) if path not in used]


def _tables(folder: Path) -> Iterator[Table]:
    for kind in KINDS:
        groups: dict[tuple[str, str, str], list[tuple[Path, Evidence]]] = {}
        for path in _files(kind, folder):
            found = read(path, kind)
            groups.setdefault((found.device, found.vllm, found.variant), []).append((path, found))
        for (device, vllm, variant), files in groups.items():
            files.sort(key=lambda pair: _age(*pair), reverse=True)
            if sources := tuple(_sources(files)):  # a file without rows supplies no table
                yield Table(kind, device, vllm, variant, sources)


def _sources(files: list[tuple[Path, Evidence]]) -> Iterator[Source]:
    shown: set[str] = set()
    for path, found in files:
        models = tuple(dict.fromkeys(m for m in map(_model, found.rows) if m not in shown))
        shown.update(models)
        if models:
            yield Source(path, found, models)


def _files(kind: type[Evidence], folder: Path) -> list[Path]:
    found = folder.rglob(f"{kind.kind}-*.json")
    return sorted(path for path in found if ARCHIVE not in path.relative_to(folder).parts)


def _age(path: Path, evidence: Evidence) -> tuple[str, str, str]:
    """Ascending with time; the name decides between files that were written at the same time only."""
    return evidence.date, evidence.time, path.stem


def _release(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        return Version("0")
