"""Anchors: the fingerprint of a seam's source in one vLLM release. Nothing here imports vLLM.

An anchor holds the file, the signature, a digest of the normalized source, and the source itself. If the anchor moves,
bi_patch shows upstream's change as a diff of the two sources. Normalized source is the syntax tree without comments,
docstrings, formatting and empty fields. Neither a formatter nor the Python version changes its digest.
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
from bi_patch.seams.plan import Plan, Planned, anchored

PATCHES = Path(__file__).resolve().parent.parent / "patches"
FILE = "anchors.json"


class Anchor(msgspec.Struct, frozen=True):
    """seam: the seam's name. target: `module:qualname`. file: a path inside the release. digest: sha256 (hex) of the
    normalized source. source: the text that the release has."""

    seam: str
    target: str
    file: str
    signature: str
    digest: str
    source: str


class Recorded(msgspec.Struct, frozen=True):
    """The contents of `anchors.json` for one release of one package.

    anchors: an anchor for each seam, and for what a seam relies on. copies: for each seam whose target is a name of a
    module (not of a class), the modules that copy the name with a `from ... import` at their top.
    """

    anchors: tuple[Anchor, ...] = ()
    copies: dict[str, list[str]] = {}

    def by_seam(self) -> dict[str, Anchor]:
        return {anchor.seam: anchor for anchor in self.anchors}


def read(folder: Path) -> Recorded:
    """The record in a release's folder, or an empty record if the file is missing or damaged."""
    return files.read_json(folder / FILE, Recorded) or Recorded()


def write(folder: Path, recorded: Recorded) -> None:
    """Write the record into a release's folder, sorted by seam, so that a new seam adds one entry to the file."""
    anchors = tuple(sorted(recorded.anchors, key=lambda anchor: anchor.seam))
    files.write_json(folder / FILE, Recorded(anchors, dict(sorted(recorded.copies.items()))))


def path_of(module: str, exists) -> str | None:
    """The path of `module` in the tree that holds the package, or None. exists: relative path -> bool."""
    base = module.replace(".", "/")
    return next((p for p in (f"{base}.py", f"{base}/__init__.py") if exists(p)), None)


def take(planned: Planned, file: str, text: str) -> Anchor:
    """The anchor of a planned seam in `text`, the contents of `file`. Raises AnchorMoved if the target is missing."""
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
    """The folder with the series and anchors of a package's release, e.g. patches/vllm-ascend-0.23.0."""
    return PATCHES / f"{PACKAGES[package][0]}-{release}"


def package_of(module: str) -> str:
    return module.split(".", 1)[0]


def compare(old: Anchor, new: Anchor) -> str | None:
    """None if the anchor did not move, else upstream's change of the target as a unified diff."""
    if old.digest == new.digest:
        return None
    lines = difflib.unified_diff(
        old.source.splitlines(), new.source.splitlines(), f"recorded/{old.file}", f"found/{new.file}", lineterm=""
    )
    return "\n".join(lines)


def check_installed(plan: Plan, folder: Path, cache: Path) -> None:
    """Compare the anchors of the vLLM in `folder`, the folder that holds the package, with the recorded anchors.

    A plugin's modules come from `folder` if it holds the plugin, else from where Python finds the plugin.

    cache: keeps the result under the size and time of each file, so that an installation is compared once.
    Raises AnchorMoved with each anchor that moved and upstream's change.
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
            f"vLLM {plan.release} in {folder} differs from the release for which the patch points were written:\n"
            + "\n".join(moved)
            + "\nInstall the released build, or set BI_PATCH=0"
        )
    files.write_json(remembered, stamp)


class _Place(NamedTuple):
    """The place of a planned seam. root: the folder that holds the package. file: a path in root, None if missing."""

    planned: Planned
    root: Path
    file: str | None


def _places(plan: Plan, folder: Path) -> list[_Place]:
    """The place of everything that has an anchor."""
    roots = {package: _root(package, folder) for package in {package_of(p.target.module) for p in plan.seams}}
    places = []
    for planned in anchored(plan.seams):
        root = roots[package_of(planned.target.module)]
        places.append(_Place(planned, root, path_of(planned.target.module, lambda p, root=root: (root / p).is_file())))
    return places


def _root(package: str, folder: Path) -> Path:
    """The folder that holds a package: `folder`, or else the folder in which Python finds the package."""
    if not (folder / package).is_dir():
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            return Path(place).parent
    return folder


def _stamp(plan: Plan, places: list[_Place]) -> str:
    """A digest (hex) of the planned files' sizes and times, the recorded anchors and the targets."""
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
    """The last definition or assignment of a dotted name, which is the definition that Python keeps."""
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
    """The statements of a body and of its if, else, try and with blocks, where branches for platforms define names."""
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
    """The tree as text, without positions, docstrings and empty fields. Newer Python versions add empty fields."""
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
