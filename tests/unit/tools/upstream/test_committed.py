"""The committed series, anchors and copies match the seams. If not, run `bi-patch check --write`."""

import pytest

from bi_patch.platforms.releases import PACKAGES
from bi_patch.seams import anchors
from bi_patch.seams.plan import anchored
from bi_patch.settings import Settings
from bi_patch.tools.upstream import check, fetch, series
from bi_patch.tools.upstream.sources import open_source

EACH = [(package, release) for package, (_, releases) in PACKAGES.items() for release in releases]
each = pytest.mark.parametrize(("package", "release"), EACH)
AGAIN = "out of date: run `bi-patch check --write`"


def recorded(release, package="vllm"):
    return anchors.read(anchors.folder_of(release, package))


@each
def test_series_is_that_of_the_seams(package, release):
    wanted = series.make(series.planned_seams(release, package), recorded(release, package).copies)
    assert series.stale(wanted, series.read(anchors.folder_of(release, package))) == [], AGAIN


@each
def test_anchors_are_those_of_the_seams(package, release):
    targets = {name: anchor.target for name, anchor in recorded(release, package).by_seam().items()}
    assert targets == {p.seam.name: str(p.target) for p in anchored(series.planned_seams(release, package))}, AGAIN


@each
def test_copies_are_those_of_the_seams(package, release):
    wanted = {p.seam.name for p in series.planned_seams(release, package) if "." not in p.target.qualname}
    assert set(recorded(release, package).copies) == wanted, AGAIN


@each
def test_the_record_is_sorted(package, release):
    folder = anchors.folder_of(release, package)
    found = recorded(release, package)
    names = [anchor.seam for anchor in found.anchors]
    assert names == sorted(set(names)) and list(found.copies) == sorted(found.copies), AGAIN
    assert [c.name for c in series.read(folder)] == sorted(p.name for p in folder.glob("*.patch")), AGAIN


def test_every_listed_copy_is_in_some_release():
    for package, release in EACH:
        for item in series.planned_seams(release, package):
            releases = PACKAGES[package][1]
            held = {m for r in releases for m in recorded(r, package).copies.get(item.seam.name, ())}
            assert {m for m in item.target.copies if anchors.package_of(m) == package} <= held, item.seam.name


def test_no_folder_without_a_release():
    assert {p.name for p in anchors.PATCHES.iterdir() if p.is_dir()} == {f"{PACKAGES[p][0]}-{r}" for p, r in EACH}


@pytest.mark.slow
@each
def test_the_release_fits(package, release):
    kept = fetch.fetch(release, Settings().cache.expanduser(), package)
    assert check.check(open_source(str(kept))).problems == []
