"""Writes what a release's folder under patches/ holds: the series, the anchors, the modules with copies."""

from pathlib import Path

import msgspec

from bi_patch.errors import PatchError
from bi_patch.platforms.releases import PACKAGES
from bi_patch.seams import anchors
from bi_patch.seams.plan import Planned
from bi_patch.tools.upstream import check, places, series
from bi_patch.tools.upstream.sources import Source

_INDEX_TEXT = "# Patches for {name} {release}, in the order in which they are applied (`git apply -p1`).\n"


def record(source: Source) -> Path:
    """Generate and write the folder of a source's release, and return it.

    Raises PatchError for a release that the registry does not list, or AnchorMoved where a target is missing;
    nothing is written then.
    """
    releases = PACKAGES[source.package][1]
    if source.release not in releases:
        raise PatchError(
            f"{_name(source)} {source.release} is not in bi_patch/platforms/releases.py "
            f"({', '.join(releases)}): add it there, and make the seams' targets hold for it, first"
        )
    folder = anchors.folder_of(source.release, source.package)
    write(source, series.planned_seams(source.release, source.package), folder)
    return folder


def write(source: Source, planned: tuple[Planned, ...], folder: Path) -> None:
    """Write the series, anchors and copies of these seams in a source. Raises AnchorMoved, PatchError."""
    taken = [places.take(item, source) for item in planned]
    held = places.holders(planned, source)
    texts = {}
    for patch in series.make(planned, held):
        file = anchors.path_of(patch.module, source.files.__contains__)
        assert file is not None, "targets were taken and holders found in this source"
        text = source.text(file)
        if series.CALL in text:
            raise PatchError(f"{source.label}: {file} carries bi_patch's call already: record the unpatched release")
        texts[patch.name] = patch.diff(file, text)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.patch"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    index = _INDEX_TEXT.format(name=_name(source), release=source.release) + "".join(f"{name}\n" for name in texts)
    (folder / series.INDEX).write_text(index)
    for name, value in (("anchors.json", taken), (check.HOLDERS, held)):
        (folder / name).write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def _name(source: Source) -> str:
    return "vLLM" if source.package == "vllm" else PACKAGES[source.package][0]
