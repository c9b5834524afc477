"""A result says which bi_patch made it, and with which command."""

import subprocess
from pathlib import Path

import pytest

import bi_patch
from bi_patch import identity
from bi_patch.tools import provenance


@pytest.fixture(autouse=True)
def _fresh():
    provenance._commit.cache_clear()
    yield
    provenance._commit.cache_clear()


def _repository(root: Path, monkeypatch) -> str:
    """A git repository whose package stands in for bi_patch. Returns the repository's commit."""
    (root / "bi_patch").mkdir()
    (root / "bi_patch" / "__init__.py").write_text("")
    (root / "kernels").mkdir()
    (root / "kernels" / "gemm.cpp").write_text("// a kernel\n")
    (root / "results.json").write_text("{}")
    for command in (
        "init -q",
        "add bi_patch kernels results.json",
        "-c user.name=n -c user.email=n@example.org commit -qm first",
    ):
        subprocess.run(["git", "-C", str(root), *command.split()], check=True)
    monkeypatch.setattr(provenance, "_PACKAGE", root / "bi_patch")
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("program", ["/somewhere/bin/bi-patch", "-c"])
def test_names_version_digest_and_command(program, monkeypatch):
    monkeypatch.setattr("sys.argv", [program, "verify", "--json", "a b.json"])
    found = provenance.here()
    assert (found.bi_patch, found.digest) == (bi_patch.__version__, identity.digest())
    assert found.command == "bi-patch verify --json 'a b.json'"


def test_commit_of_the_source_tree(tmp_path, monkeypatch):
    commit = _repository(tmp_path, monkeypatch)
    assert (provenance.here().commit, provenance.here().dirty) == (commit, False)


def test_a_changed_source_is_dirty_and_a_changed_result_is_not(tmp_path, monkeypatch):
    commit = _repository(tmp_path, monkeypatch)
    (tmp_path / "results.json").write_text("{1}")
    assert not provenance.here().dirty
    provenance._commit.cache_clear()
    (tmp_path / "kernels" / "gemm.cpp").write_text("// another\n")
    assert (provenance.here().commit, provenance.here().dirty) == (commit, True)


def test_an_installation_inside_another_repository_has_no_commit(tmp_path, monkeypatch):
    _repository(tmp_path, monkeypatch)
    inner = tmp_path / "env" / "bi_patch"
    inner.mkdir(parents=True)
    (inner / "__init__.py").write_text("")
    monkeypatch.setattr(provenance, "_PACKAGE", inner)
    assert (provenance.here().commit, provenance.here().dirty) == (None, False)


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path / "bi_patch")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.here().commit is None
