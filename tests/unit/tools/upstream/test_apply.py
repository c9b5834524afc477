"""Applying and reversing with git leaves every byte as it was, in folders of any kind."""

import subprocess

import pytest

from bi_patch.errors import PatchError
from bi_patch.tools.upstream import apply, series


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def paths(small):
    return [patch.path for patch in series.read(small.series)]


def test_apply_and_reverse(small):
    before = contents(small.tree)
    apply.apply_series(small.tree, paths(small))
    after = contents(small.tree)
    changed = {str(name) for name in after if after[name] != before[name]}
    assert changed == {"vllm/ops.py", "vllm/user.py", "vllm/core/sched.py", "vllm/core/dos.py"}
    for name in changed:
        assert (small.tree / name).read_text().endswith(series.CALL)
    apply.reverse_series(small.tree, paths(small))
    assert contents(small.tree) == before


def test_a_last_line_without_newline_is_kept_whole(small):
    patch = small.patch("core-sched")
    assert "\\ No newline at end of file" in patch.read_text()
    apply.apply(small.tree, patch)
    assert (small.tree / "vllm/core/sched.py").read_text().endswith(f"        return os.getpid()\n{series.TAIL}")


def test_a_failing_series_leaves_nothing_applied(small):
    small.change("vllm/core/dos.py", "return 1", "return 2")
    before = contents(small.tree)
    with pytest.raises(PatchError, match="core-dos.patch does not apply"):
        apply.apply_series(small.tree, paths(small))
    assert contents(small.tree) == before


def test_reversing_what_was_not_applied_fails(small):
    with pytest.raises(PatchError, match="does not reverse"):
        apply.reverse_series(small.tree, paths(small))


def test_applies_inside_another_repository(small, monkeypatch):
    """git apply skips, in silence, files that belong to an enclosing repository's other folders."""
    top = small.tree.parent
    subprocess.run(["git", "init", "--quiet", str(top)], check=True)
    monkeypatch.setenv("GIT_DIR", str(top / ".git"))
    apply.apply(small.tree, small.patch("ops"))
    assert (small.tree / "vllm/ops.py").read_text().endswith(series.CALL)


def test_without_git_the_error_says_so(small, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PatchError, match="`git` is not on PATH"):
        apply.apply(small.tree, small.patch("ops"))


def test_patched_copy_leaves_the_original_alone(small, monkeypatch, tmp_path):
    from packaging.version import Version

    from bi_patch.installed import Installed

    found = Installed(small.tree / "vllm", Version("0.32.0"), "cpu", "vllm")
    monkeypatch.setattr(apply.installed, "find", lambda platform: found)
    monkeypatch.setattr(apply.anchors, "PATCHES", small.series.parent)
    before = contents(small.tree)
    copy = apply.patched_copy(tmp_path / "copy")
    assert contents(small.tree) == before
    assert (copy / "vllm/ops.py").read_text().endswith(series.CALL)
    assert (copy / "vllm/lazy.py").is_symlink()
    with pytest.raises(PatchError, match="there already"):
        apply.patched_copy(tmp_path / "copy")
