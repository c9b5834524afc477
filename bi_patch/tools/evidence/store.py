"""Writes and reads result files, and chooses the newest files for each table."""

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
    """A table or plot was requested, and the folder holds no result files."""


class EvidenceUnreadable(BiPatchError):
    """A result file is not JSON, or lacks a field that its kind requires."""


class Measured(Protocol):
    """What a file records about the machine: an engine's Info, or a Report of verify."""

    device: str
    vllm: str
    torch: str
    threads: int


def new(kind: type[Kind], measured: Measured, made_by: Provenance | None = None) -> Kind:
    """A file of this kind with the present time and without rows.

    made_by: the provenance of the process that measured, by default this process. Without git, the commit is None.
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
    """The release of Triton in this process's environment, "" without Triton."""
    for name in _TRITON:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def file_name(evidence: Evidence) -> str:
    """The name of the file, e.g. cost-2026-11-28-cpu-vllm-0.32.0.json."""
    where = "-".join(filter(None, (evidence.platform, evidence.variant)))
    release = re.sub(r"[^0-9A-Za-z.]+", "-", evidence.vllm)
    return f"{evidence.kind}-{evidence.date}-{where}-vllm-{release}.json"


def write(evidence: Evidence, folder: Path = RESULTS) -> Path:
    """Write the file and return its path; `evidence` is not changed.

    An earlier file with the same head (apart from time and note) is updated: it keeps its rows of other models. A file
    of faults is replaced as a whole. If the head differs, for example in the command, the new file gets another name,
    `...-2.json`. Raises OSError, and EvidenceUnreadable for an earlier file that is broken.
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
    """Everything in the head except the time and the note."""
    return tuple(getattr(evidence, name) for name in Evidence.__struct_fields__ if name not in ("time", "note")) + (
        evidence.variant,
    )


def _model(row: msgspec.Struct) -> str:
    return getattr(row, "model", "")


def read(path: Path, kind: type[Kind]) -> Kind:
    """Read a file. Raises EvidenceUnreadable for a file that is not of this kind, OSError when it cannot be opened."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.DecodeError as error:
        raise EvidenceUnreadable(f"{path} is no {kind.kind} file: {error}") from error


@dataclass(frozen=True)
class Source:
    """One file, and the models whose rows a table takes from the file, because no newer file measured them."""

    path: Path
    evidence: Evidence
    models: tuple[str, ...]

    @property
    def rows(self) -> list:
        return [row for row in self.evidence.rows if _model(row) in self.models]


@dataclass(frozen=True)
class Table:
    """The current rows of one kind, device, release and variant.

    sources: the newest file first; each supplies the rows of at least one model.
    """

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
        """The table's mark, e.g. cost-h100."""
        return "-".join(filter(None, (self.kind.kind, self.newest.evidence.platform, self.variant)))

    @property
    def rows(self) -> list:
        """The rows of all sources, the oldest source first, as if all had been added to one file."""
        return [row for source in reversed(self.sources) for row in source.rows]

    @property
    def evidence(self) -> Evidence:
        """The newest file with the rows of all sources."""
        return msgspec.structs.replace(self.newest.evidence, rows=self.rows)


def current(folder: Path = RESULTS) -> dict[str, Table]:
    """Every table by its mark: `cost-h100` for a device's newest release, `cost-h100-vllm-0.26.0` for each release.

    Device, release and date are read from the files, not from their names. A table shows each model's rows from the
    newest file that measured the model; a table of faults shows the newest file only. When two devices have the same
    short name, the mark belongs to the newer file. Subfolders are read, too, except archive. Raises EvidenceMissing for
    a folder without files, EvidenceUnreadable for a broken file.
    """
    marks: dict[str, Table] = {}
    for table in sorted(_tables(folder), key=lambda t: (_release(t.vllm), _age(t.newest.path, t.newest.evidence))):
        marks[table.name] = marks[f"{table.name}-vllm-{table.vllm}"] = table
    if not marks:
        raise EvidenceMissing(f"{folder} holds no result files: run `bi-patch bench` first")
    return dict(sorted(marks.items()))


def superseded(folder: Path = RESULTS) -> list[Path]:
    """Files that supply no table, because newer files hold all their models. Raises EvidenceUnreadable."""
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
    """A key that sorts files by time; the name decides only between files of the same time."""
    return evidence.date, evidence.time, path.stem


def _release(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        return Version("0")
