"""Fixtures of unit tests: a package that looks like vLLM to code that does not import vLLM's modules."""

import os
from pathlib import Path

import pytest


def first_on_path(folder: Path) -> str:
    """A PYTHONPATH that begins with `folder`."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


@pytest.fixture
def fake_vllm(tmp_path):
    """fake_vllm(release): a PYTHONPATH that begins with a package vllm of this release, which holds no modules."""

    def make(release: str) -> str:
        (tmp_path / "vllm").mkdir()
        (tmp_path / "vllm" / "__init__.py").write_text("loaded = True\n")
        (tmp_path / "vllm" / "_version.py").write_text(f"__version__ = version = '{release}'\n")
        return first_on_path(tmp_path)

    return make
