"""The committed series, anchors and copies are as the seams ask; else `bi-patch check --write`."""

import pytest

from bi_patch import files
from bi_patch.fork import check, fetch, series
from bi_patch.fork.sources import open_source
from bi_patch.seams import anchors
from bi_patch.seams.registry import RELEASES
from bi_patch.settings import Settings

AGAIN = "out of date: run `bi-patch check --write`"


def recorded_copies(release):
    return files.read_json(anchors.PATCHES / f"vllm-{release}" / check.HOLDERS, dict[str, list[str]])


@pytest.mark.parametrize("release", RELEASES)
def test_series_is_that_of_the_seams(release):
    wanted = series.make(series.planned_seams(release), recorded_copies(release))
    assert series.stale(wanted, series.read(anchors.PATCHES / f"vllm-{release}")) == [], AGAIN


@pytest.mark.parametrize("release", RELEASES)
def test_anchors_are_those_of_the_seams(release):
    recorded = {name: anchor.target for name, anchor in anchors.recorded(release).items()}
    assert recorded == {p.seam.name: str(p.target) for p in series.planned_seams(release)}, AGAIN


@pytest.mark.parametrize("release", RELEASES)
def test_copies_are_those_of_the_seams(release):
    recorded = recorded_copies(release)
    wanted = {p.seam.name for p in series.planned_seams(release) if "." not in p.target.qualname}
    assert recorded is not None and set(recorded) == wanted, AGAIN


def test_every_listed_copy_is_in_some_release():
    for release in RELEASES:
        for item in series.planned_seams(release):
            held = {m for r in RELEASES for m in recorded_copies(r).get(item.seam.name, ())}
            assert {m for m in item.target.copies if series.inside(m)} <= held, item.seam.name


def test_no_folder_without_a_release():
    assert {p.name for p in anchors.PATCHES.iterdir() if p.is_dir()} == {f"vllm-{r}" for r in RELEASES}


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_the_released_vllm_fits(release):
    kept = fetch.fetch(release, Settings().cache.expanduser())
    assert check.check(open_source(str(kept))).problems == []
