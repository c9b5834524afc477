"""What unit tests share: a package that looks like vLLM to whatever does not import it."""

import os
from pathlib import Path

import pytest


def first_on_path(folder: Path) -> str:
    """PYTHONPATH with `folder` before what it holds already."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


@pytest.fixture
def fake_vllm(tmp_path):
    """fake_vllm(release): PYTHONPATH with a package vllm of that release, which holds no modules."""

    def make(release: str) -> str:
        (tmp_path / "vllm").mkdir()
        (tmp_path / "vllm" / "__init__.py").write_text("loaded = True\n")
        (tmp_path / "vllm" / "_version.py").write_text(f"__version__ = version = '{release}'\n")
        return first_on_path(tmp_path)

    return make
