"""The patch series of a release, generated from the seams: one diff per vLLM module adds one call to its end.

A diff opens with a header of fields (`Description`, `Target`, `Closes`, `Copies`, `Why`, `How`, `Until`),
whose further lines begin with a space, as in DEP-3. The logic stays in bi_patch/seams: the call closes them.
"""

import difflib
import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from packaging.version import Version

from bi_patch.arming import catalog
from bi_patch.errors import PatchError
from bi_patch.platforms import releases
from bi_patch.seams.plan import Planned
from bi_patch.tools.upstream.sources import PACKAGE

CALL = """\
__import__("bi_patch_entry").close(__name__)
"""
INDEX = "series"


@dataclass(frozen=True)
class Patch:
    """What one diff must be. closes: seams whose target is in `module`; copies: seams it holds a copy of."""

    name: str
    module: str
    closes: tuple[Planned, ...]
    copies: tuple[Planned, ...]

    def tail(self) -> str:
        """The lines that the diff adds to the end of the module."""
        parts = []
        if self.closes:
            parts.append("closes " + _names(self.closes))
        if self.copies:
            parts.append("hands out " + _names(self.copies))
        return f"\n# bi_patch: {'; '.join(parts)}\n{CALL}"

    def header(self, file: str) -> str:
        """The fields before the diff. file: the module's path, e.g. `vllm/config/vllm.py`."""
        seams = (*self.closes, *self.copies)
        verb = "Close the seams in" if self.closes else "Hand replacements to"
        fields = {
            "Description": [f"{verb} {self.module}"],
            "Origin": ["generated from bi_patch/seams by `bi-patch check --write`"],
            "Forwarded": ["not-needed"],
            "Target": [file],
            "Platforms": [" ".join(sorted({name for p in seams for name in p.seam.platforms}))],
            "Closes": [p.seam.name for p in self.closes],
            "Copies": [p.seam.name for p in self.copies],
            "Why": [f"{p.seam.name}: {_line(p.seam.why)}" for p in seams],
            "How": [f"{p.seam.name}: {_line(p.seam.how)}" for p in seams],
            "Until": [f"{p.seam.name}: {_line(p.seam.until)}" for p in seams],
        }
        return "".join(f"{name}: " + "\n ".join(lines) + "\n" for name, lines in fields.items() if lines)

    def patched(self, text: str) -> str:
        """The module's text as it is once the diff is applied."""
        return text + ("" if text.endswith("\n") or not text else "\n") + self.tail()

    def diff(self, file: str, text: str) -> str:
        """The whole patch file for a module of this text."""
        lines = difflib.unified_diff(_lines(text), _lines(self.patched(text)), f"a/{file}", f"b/{file}")
        body = "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
        return f"{self.header(file)}\n---\n{body}"


@dataclass(frozen=True)
class Committed:
    """A patch file as it lies on disk. header: its text before the diff. added: the lines that it adds."""

    path: Path
    header: str
    target: str
    closes: tuple[str, ...]
    copies: tuple[str, ...]
    added: str
    removed: str

    @property
    def name(self) -> str:
        return self.path.name


def planned_seams(release: str, package: str = PACKAGE) -> tuple[Planned, ...]:
    """Every seam with a target in `package` at `release`, over all platforms that support it, in the registry's order.

    Raises UnsupportedRelease for a release that is not in the matrix.
    """
    version = Version(release)
    platforms = [name for name, known in releases.BY_PLATFORM.items() if release in known]
    plans = [catalog.plan(version, platform) for platform in platforms or releases.BY_PLATFORM]
    planned = {p.seam.name: p for plan in plans for p in plan.seams}
    return tuple(
        planned[s.name]
        for s in catalog.CATALOG.seams
        if s.name in planned and inside(planned[s.name].target.module, package)
    )


def inside(module: str, package: str = PACKAGE) -> bool:
    """Whether a module belongs to a package's tree. A plugin's modules are not in vLLM's."""
    return module.split(".", 1)[0] == package


def make(planned: tuple[Planned, ...], held: Mapping[str, Collection[str]]) -> tuple[Patch, ...]:
    """The series for these seams. A number is the area's place and the module's place in the area.

    held: by seam, the modules that hold a copy in this release. Of Target.copies, these alone get a patch.
    """
    closes: dict[str, list[Planned]] = {}
    copies: dict[str, list[Planned]] = {}
    for item in planned:
        closes.setdefault(item.target.module, []).append(item)
        for module in (m for m in item.target.copies if m in held.get(item.seam.name, ())):
            copies.setdefault(module, []).append(item)
    areas = sorted({p.seam.area for p in planned})
    patches = []
    for number, area in enumerate(areas, 1):
        modules = [m for m in {**closes, **copies} if (closes.get(m) or copies[m])[0].seam.area == area]
        for place, module in enumerate(modules, 1):
            slug = module.partition(".")[2].replace(".", "-").replace("_", "-") or module
            name = f"{number:02}{place:02}-{area}-{slug}.patch"
            patches.append(Patch(name, module, tuple(closes.get(module, ())), tuple(copies.get(module, ()))))
    return tuple(patches)


def read(folder: Path) -> tuple[Committed, ...]:
    """The patches that `folder/series` lists, in its order.

    Raises PatchError when there is no series, when it lists a file twice or one that is not there, when a
    patch that it does not list lies beside it, or when a file is not a patch of one module.
    """
    index = folder / INDEX
    if not index.is_file():
        raise PatchError(f"{folder} holds no file `{INDEX}`")
    lines = (line.strip() for line in index.read_text().splitlines())
    names = [line for line in lines if line and not line.startswith("#")]
    present = {path.name for path in folder.glob("*.patch")}
    if len(set(names)) < len(names) or set(names) != present:
        twice = sorted({n for n in names if names.count(n) > 1})
        parts = {
            "listed twice": twice,
            "listed but missing": sorted(set(names) - present),
            "not listed": sorted(present - set(names)),
        }
        told = "; ".join(f"{what}: {', '.join(which)}" for what, which in parts.items() if which)
        raise PatchError(f"{index} does not match the folder: {told}")
    return tuple(parse(folder / name) for name in names)


def parse(path: Path) -> Committed:
    """A patch file. Raises PatchError when it has no header, or changes not just the file that it names."""
    header, mark, body = path.read_bytes().decode(errors="replace").partition("\n---\n")
    fields = HeaderParser().parsestr(header)
    target = (fields["Target"] or "").strip()
    if not mark or not target:
        raise PatchError(f"{path.name} has no header with a Target and a line of three dashes before its diff")
    lines = body.split("\n")
    files = [line[4:].split("\t")[0] for line in lines if line.startswith(("--- ", "+++ "))]
    if files != [f"a/{target}", f"b/{target}"] or any(line.startswith("diff --git") for line in lines):
        raise PatchError(f"{path.name} changes {', '.join(files) or 'nothing'}, and not {target} alone")
    changed = [line for line in lines if not line.startswith(("--- ", "+++ "))]
    return Committed(
        path=path,
        header=header,
        target=target,
        closes=tuple((fields["Closes"] or "").split()),
        copies=tuple((fields["Copies"] or "").split()),
        added="".join(f"{line[1:]}\n" for line in changed if line.startswith("+")),
        removed="".join(f"{line[1:]}\n" for line in changed if line.startswith("-")),
    )


def stale(patches: tuple[Patch, ...], committed: tuple[Committed, ...]) -> list[str]:
    """How a committed series differs from the one that the seams ask for, told without vLLM's sources."""
    wanted, have = [p.name for p in patches], [c.name for c in committed]
    if wanted != have:
        lines = difflib.unified_diff(have, wanted, "committed/series", "seams", n=0, lineterm="")
        return ["the series is not the one that the seams ask for:\n" + "\n".join(lines)]
    told = []
    for patch, found in zip(patches, committed, strict=True):
        if found.header.strip() != patch.header(found.target).strip():
            told.append(f"{found.name}: its header is not the one of the seams {_names(patch.closes + patch.copies)}")
        base = patch.module.replace(".", "/")
        if found.target not in (f"{base}.py", f"{base}/__init__.py"):
            told.append(f"{found.name}: {found.target} is not the file of {patch.module}")
        # A module without a last newline has its last line removed and added again.
        if found.added != found.removed + patch.tail():
            told.append(f"{found.name}: it adds other lines than the call that closes {patch.module}")
    return told


def _names(planned: tuple[Planned, ...]) -> str:
    return ", ".join(p.seam.name for p in planned)


def _line(text: str) -> str:
    return " ".join(text.split())


def _lines(text: str) -> list[str]:
    """Lines with their ends, split at \\n only: a form feed or a lone \\r is text to git."""
    return list(io.StringIO(text, newline="\n"))
