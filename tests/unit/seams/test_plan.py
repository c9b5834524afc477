"""The plan of each release and platform, and rules that all declarations must keep."""

import re
from pathlib import Path

import pytest
from packaging.version import Version

from bi_patch.arming.catalog import CATALOG, plan
from bi_patch.errors import UnsupportedRelease
from bi_patch.platforms.releases import ALL, BY_PLATFORM
from bi_patch.seams import registry
from bi_patch.tools.evidence.kinds import CAUSES


def test_names_are_unique_and_in_their_area():
    names = [item.name for item in (*CATALOG.seams, *CATALOG.variables, *CATALOG.policies)]
    assert len(names) == len(set(names))
    for folder, _ in registry._FOLDERS:
        for module in registry._modules(folder):
            own = module.__name__.rsplit(".", 1)[1]
            for kind in ("SEAMS", "VARIABLES", "POLICIES"):
                assert all(item.area == own for item in getattr(module, kind, ())), module


def test_every_seam_says_why_how_and_until():
    page = Path(__file__).parents[3] / "docs" / "causes.md"
    known = {int(number) for number in re.findall(r"^\| (\d+) \|", page.read_text(), re.MULTILINE)}
    for seam in CATALOG.seams:
        assert seam.why and seam.how and seam.until, seam.name
        assert known.issuperset(seam.causes), seam.name
    assert len(known) == CAUSES


def test_at_most_one_target_a_release():
    for seam in CATALOG.seams:
        for release in ALL:
            holding = [t for t in seam.targets if t.holds(Version(release))]
            assert len(holding) <= 1, (seam.name, release, holding)


def test_every_target_is_used_by_some_release():
    for seam in CATALOG.seams:
        for target in seam.targets:
            assert any(target.holds(Version(r)) for r in ALL), (seam.name, target)


@pytest.mark.parametrize("platform", BY_PLATFORM)
def test_every_plan_holds_the_start_up_check(platform):
    for release in BY_PLATFORM[platform]:
        made = plan(Version(release), platform)
        assert {"engine.config", "engine.worker"} <= {p.seam.name for p in made.seams}
        assert set(made.by_module) <= set(made.modules)


@pytest.mark.parametrize("release", BY_PLATFORM["cpu"])
def test_cpu_covers_every_area(release):
    made = plan(Version(release), "cpu")
    areas = {p.seam.area for p in made.seams} | {p.area for p in made.policies}
    assert {"linear", "norm", "attention", "moe", "sampling", "scheduler", "compilation", "features"} <= areas


@pytest.mark.parametrize(
    "release, platform, said",
    [("0.99.0", "cuda", ALL[-1]), ("0.32.1", "cpu", "not supported"), ("0.26.0", "cpu", "on cpu")],
)
def test_unknown_releases_are_refused(release, platform, said):
    with pytest.raises(UnsupportedRelease, match=said):
        plan(Version(release), platform)
