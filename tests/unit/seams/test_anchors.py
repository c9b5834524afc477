"""Anchors: which changes of a seam's target move its anchor, and which do not."""

import pytest
from packaging.version import Version

from bi_patch.errors import AnchorMoved
from bi_patch.platforms.releases import BY_PLATFORM
from bi_patch.seams import anchors, plan
from bi_patch.seams.model import Seam, Target
from bi_patch.seams.plan import Planned

SOURCE = '''
import os

class Layer:
    """A layer."""

    def apply(self, x: int, y=3) -> int:
        """Doc."""
        return x + y  # sum

if os.name:
    def free(a):
        return a
'''


def planned(qualname, **more):
    made = {"close": lambda o: o, "why": "why", "how": "how", "until": "until"} | more
    seam = Seam(name="x.y", targets=(Target("pkg.mod", qualname),), **made)
    return Planned(seam, seam.targets[0])


def take(text, qualname="Layer.apply"):
    return anchors.take(planned(qualname), "pkg/mod.py", text)


@pytest.mark.parametrize(
    "change",
    [
        ("# sum", "# another comment"),
        ('"""Doc."""', '"""Other words."""'),
        ("x + y  # sum", "(x +\n            y)"),
        ("x: int, y=3", "x:int,y = 3"),
        ("import os", "import os\nimport sys"),
    ],
)
def test_what_does_not_move_an_anchor(change):
    assert anchors.compare(take(SOURCE), take(SOURCE.replace(*change))) is None


@pytest.mark.parametrize("change", [("x + y", "y + x"), ("y=3", "y=4"), ("x: int", "x")])
def test_a_changed_function_moves_and_is_shown(change):
    difference = anchors.compare(take(SOURCE), take(SOURCE.replace(*change)))
    assert difference.startswith("--- recorded/pkg/mod.py")
    assert "\n-" in difference and "\n+" in difference


def test_definitions_under_branches_are_found():
    assert take(SOURCE, "free").signature == "free(a)"


def test_a_missing_function_is_named():
    with pytest.raises(AnchorMoved, match="x.y.*Layer.gone"):
        take(SOURCE, "Layer.gone")


def write(root, text):
    (root / "pkg").mkdir(exist_ok=True)
    (root / "pkg" / "mod.py").write_text(text)


def test_what_a_seam_relies_on_has_an_anchor(tmp_path, monkeypatch):
    write(tmp_path, SOURCE)
    monkeypatch.setattr(anchors, "PATCHES", tmp_path / "patches")
    release = BY_PLATFORM["cpu"][-1]
    made = plan.Plan(Version(release), "cpu", (planned("Layer.apply", relies=("free",)),), (), ())
    taken = tuple(anchors.take(item, "pkg/mod.py", SOURCE) for item in plan.anchored(made.seams))
    assert [(anchor.seam, anchor.target) for anchor in taken] == [
        ("x.y", "pkg.mod:Layer.apply"),
        ("x.y > free", "pkg.mod:free"),
    ]
    anchors.write(anchors.folder_of(release), anchors.Recorded(taken))
    anchors.check_installed(made, tmp_path, tmp_path / "cache")
    write(tmp_path, SOURCE.replace("return a", "return -a"))
    with pytest.raises(AnchorMoved, match="x.y > free at pkg.mod:free"):
        anchors.check_installed(made, tmp_path, tmp_path / "cache")


def test_a_seam_may_rely_on_another_module(tmp_path, monkeypatch):
    write(tmp_path, SOURCE)
    (tmp_path / "pkg" / "other.py").write_text(SOURCE)
    monkeypatch.setattr(anchors, "PATCHES", tmp_path / "patches")
    release = BY_PLATFORM["cpu"][-1]
    made = plan.Plan(Version(release), "cpu", (planned("Layer.apply", relies=("pkg.other:free",)),), (), ())
    first, second = plan.anchored(made.seams)
    assert str(second.target) == "pkg.other:free" and second.seam.name == "x.y > free"
    files = {first: "pkg/mod.py", second: "pkg/other.py"}
    anchors.write(
        anchors.folder_of(release), anchors.Recorded(tuple(anchors.take(p, files[p], SOURCE) for p in (first, second)))
    )
    anchors.check_installed(made, tmp_path, tmp_path / "cache")
    (tmp_path / "pkg" / "other.py").write_text(SOURCE.replace("return a", "return -a"))
    with pytest.raises(AnchorMoved, match="x.y > free at pkg.other:free"):
        anchors.check_installed(made, tmp_path, tmp_path / "cache")


def test_installed_anchors_are_verified_and_remembered(tmp_path, monkeypatch):
    write(tmp_path, SOURCE)
    monkeypatch.setattr(anchors, "PATCHES", tmp_path / "patches")
    item = planned("Layer.apply")
    release = BY_PLATFORM["cpu"][-1]
    made = plan.Plan(Version(release), "cpu", (item,), (), ())
    cache = tmp_path / "cache"
    with pytest.raises(AnchorMoved, match="no anchor was recorded"):
        anchors.check_installed(made, tmp_path, cache)
    anchors.write(tmp_path / f"patches/vllm-{release}", anchors.Recorded((take(SOURCE),)))
    anchors.check_installed(made, tmp_path, cache)
    assert len(list((cache / "anchors").iterdir())) == 1
    anchors.check_installed(made, tmp_path, cache)  # from the cache
    write(tmp_path, SOURCE.replace("x + y", "y * x"))
    with pytest.raises(AnchorMoved, match=r"x\.y at pkg\.mod:Layer\.apply") as caught:
        anchors.check_installed(made, tmp_path, cache)
    assert "+        return y * x" in str(caught.value)
