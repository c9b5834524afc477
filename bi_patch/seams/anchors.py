"""Anchors: a seam's fingerprint in one vLLM release, from its source text, without importing vLLM.

An anchor holds the file, the signature, a digest of the normalized source, and the source itself, so that a moved
anchor can be shown as a diff. Normalized: the syntax tree without comments, docstrings, annotations' formatting and
empty fields, so neither reformatting nor the Python version changes a digest.
"""

import ast
import difflib
import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import msgspec

from bi_patch import files
from bi_patch.errors import AnchorMoved
from bi_patch.platforms.releases import PACKAGES
from bi_patch.seams.plan import Plan, Planned

PATCHES = Path(__file__).resolve().parent.parent / "patches"
FILE = "anchors.json"


class Anchor(msgspec.Struct, frozen=True):
    """seam: its name. target: `module:qualname`. file: path inside the release. digest: sha256 of the normal form."""

    seam: str
    target: str
    file: str
    signature: str
    digest: str
    source: str


class Recorded(msgspec.Struct, frozen=True):
    """What `anchors.json` holds for one release of one package.

    anchors: one for each seam. copies: for each seam on a module's own name (not a class's), the modules that take the
    name by `from ... import` at their top.
    """

    anchors: tuple[Anchor, ...] = ()
    copies: dict[str, list[str]] = {}

    def by_seam(self) -> dict[str, Anchor]:
        return {anchor.seam: anchor for anchor in self.anchors}


def read(folder: Path) -> Recorded:
    """The record in a release's folder; an empty record where the file is missing or damaged."""
    return files.read_json(folder / FILE, Recorded) or Recorded()


def write(folder: Path, recorded: Recorded) -> None:
    """Write the record into a release's folder, sorted by seam, so that a new seam is one new entry in the diff."""
    anchors = tuple(sorted(recorded.anchors, key=lambda anchor: anchor.seam))
    files.write_json(folder / FILE, Recorded(anchors, dict(sorted(recorded.copies.items()))))


def path_of(module: str, exists) -> str | None:
    """The file of `module` relative to the tree that holds the package, or None. exists: relative path -> bool."""
    base = module.replace(".", "/")
    return next((p for p in (f"{base}.py", f"{base}/__init__.py") if exists(p)), None)


def take(planned: Planned, file: str, text: str) -> Anchor:
    """The anchor of a planned seam in `text`, the contents of `file`. Raises AnchorMoved when it is not there."""
    node = _find(_parse(text), planned.target.qualname)
    if node is None:
        raise AnchorMoved(f"seam {planned.seam.name}: {file} no longer defines {planned.target.qualname}")
    return Anchor(
        planned.seam.name,
        str(planned.target),
        file,
        _signature(node),
        hashlib.sha256(_normal(node).encode()).hexdigest(),
        ast.get_source_segment(text, node) or "",
    )


def folder_of(release: str, package: str = "vllm") -> Path:
    """Where the series and anchors of a package's release lie, e.g. patches/vllm-ascend-0.23.0."""
    return PATCHES / f"{PACKAGES[package][0]}-{release}"


def package_of(module: str) -> str:
    return module.split(".", 1)[0]


def compare(old: Anchor, new: Anchor) -> str | None:
    """None where the anchor holds, else upstream's change of that object as a unified diff."""
    if old.digest == new.digest:
        return None
    lines = difflib.unified_diff(
        old.source.splitlines(), new.source.splitlines(), f"recorded/{old.file}", f"found/{new.file}", lineterm=""
    )
    return "\n".join(lines)


def check_installed(plan: Plan, folder: Path, cache: Path) -> None:
    """Check the anchors of the vLLM in `folder` (the one that holds the package) against the recorded ones.

    The modules of a plugin are looked for in `folder` first, and else where Python finds the plugin.

    cache: where the result is remembered by size and time of each file, so that an installation pays once.
    Raises AnchorMoved, naming each anchor that moved with upstream's change.
    """
    places = _places(plan, folder)
    stamp = _stamp(plan, places)
    remembered = cache / "anchors" / f"{stamp}.json"
    if files.read_json(remembered, str) == stamp:
        return
    known = {}
    for package in PACKAGES:
        known |= read(folder_of(str(plan.release), package)).by_seam()
    moved = []
    for planned, root, file in places:
        if file is None:
            moved.append(f"{planned.seam.name}: no module {planned.target.module}")
            continue
        anchor = take(planned, file, (root / file).read_text(encoding="utf-8"))
        old = known.get(planned.seam.name)
        if old is None:
            moved.append(f"{planned.seam.name}: no anchor was recorded for {planned.target}")
        elif difference := compare(old, anchor):
            moved.append(f"{planned.seam.name} at {planned.target}\n{difference}")
    if moved:
        raise AnchorMoved(
            f"vLLM {plan.release} in {folder} is not the release that the seams were written for:\n"
            + "\n".join(moved)
            + "\nInstall the released build, or set BI_PATCH=0"
        )
    files.write_json(remembered, stamp)


class _Place(NamedTuple):
    """A planned seam in the installed packages. root: holds the package. file: relative to it, None if missing."""

    planned: Planned
    root: Path
    file: str | None


def _places(plan: Plan, folder: Path) -> list[_Place]:
    """Each planned seam's file, looked up once."""
    roots = {package: _root(package, folder) for package in {package_of(p.target.module) for p in plan.seams}}
    places = []
    for planned in plan.seams:
        root = roots[package_of(planned.target.module)]
        places.append(_Place(planned, root, path_of(planned.target.module, lambda p, root=root: (root / p).is_file())))
    return places


def _root(package: str, folder: Path) -> Path:
    """The folder that holds a package: `folder`, or where Python finds it."""
    if not (folder / package).is_dir():
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            return Path(place).parent
    return folder


def _stamp(plan: Plan, places: list[_Place]) -> str:
    """A digest over the planned files' size and time, the recorded anchors and the targets."""
    parts = [str(plan.release), plan.platform]
    for package in PACKAGES:
        recorded = folder_of(str(plan.release), package) / FILE
        parts.append(hashlib.sha256(recorded.read_bytes()).hexdigest() if recorded.is_file() else "none")
    for planned, root, file in places:
        info = (root / file).stat() if file else None
        parts.append(f"{planned.seam.name} {planned.target} {root} {info and (info.st_size, info.st_mtime_ns)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@functools.lru_cache(maxsize=4)
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def _find(tree: ast.AST, qualname: str) -> ast.AST | None:
    """The definition or assignment of a dotted name; the last one, as Python would keep it."""
    scope: ast.AST | None = tree
    for part in qualname.split("."):
        found = None
        for node in _statements(scope):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == part:
                found = node
            elif isinstance(node, ast.Assign) and any(getattr(t, "id", None) == part for t in node.targets):
                found = node
            elif isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == part:
                found = node
        if found is None:
            return None
        scope = found
    return scope


def _statements(scope: ast.AST | None):
    """Statements of a body, those under if/else/try included (platform branches define names too)."""
    for node in getattr(scope, "body", ()):
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _statements(node)
            for branch in ("orelse", "finalbody"):
                yield from getattr(node, branch, ())


def _signature(node: ast.AST) -> str:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return f"{node.name}({ast.unparse(node.args)})"
    return getattr(node, "name", "") or ast.unparse(node).split("\n", 1)[0]


def _normal(node: ast.AST) -> str:
    """A text of the tree that ignores positions, docstrings, and fields that are empty (newer Pythons add some)."""
    if isinstance(node, ast.AST):
        fields = []
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(value, list) and value and _is_docstring(value[0]):
                value = value[1:]
            if value is None or value == [] or name in ("type_comment", "kind"):
                continue
            fields.append(f"{name}={_normal(value)}")
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return "[" + ",".join(_normal(item) for item in node) + "]"
    return repr(node)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
