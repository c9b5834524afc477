"""Writes a release's folder under patches/: the series with its diffs, and the anchors."""

from pathlib import Path

from bi_patch.errors import PatchError
from bi_patch.platforms.releases import PACKAGES
from bi_patch.seams import anchors
from bi_patch.seams.plan import Planned, anchored
from bi_patch.tools.upstream import moved, series
from bi_patch.tools.upstream.places import locate
from bi_patch.tools.upstream.sources import Source

_INDEX_TEXT = "# Patches for {name} {release}, in the order in which they are applied (`git apply -p1`).\n"


def record(source: Source) -> Path:
    """Generate and write the folder of a source's release, and return the folder.

    Raises PatchError for a release that bi_patch/platforms/releases.py does not list, or AnchorMoved for a missing
    target. In both cases, nothing is written.
    """
    releases = PACKAGES[source.package][1]
    if source.release not in releases:
        raise PatchError(
            f"{source.name} {source.release} is not in bi_patch/platforms/releases.py "
            f"({', '.join(releases)}): first add the release there, and give the seams targets in it"
        )
    folder = anchors.folder_of(source.release, source.package)
    write(source, series.planned_seams(source.release, source.package), folder)
    return folder


def write(source: Source, planned: tuple[Planned, ...], folder: Path) -> None:
    """Write the series and the anchors of these seams in a source. Raises AnchorMoved, PatchError."""
    places = locate(source, planned)
    taken = tuple(moved.take(item, places.modules.get(item.target.module)) for item in anchored(planned))
    texts = {}
    for patch in series.make(planned, places.copies):
        module = places.modules[patch.module]
        if series.CALL in module.text:
            raise PatchError(f"{source.label}: {module.file} is patched already: record the unpatched release")
        texts[patch.name] = patch.diff(module.file, module.text)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.patch"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    index = _INDEX_TEXT.format(name=source.name, release=source.release) + "".join(f"{name}\n" for name in texts)
    (folder / series.INDEX).write_text(index)
    anchors.write(folder, anchors.Recorded(taken, dict(places.copies)))
