"""Applying and then reversing with git restores every byte, in any kind of folder."""

import subprocess

import pytest

from bi_patch.errors import PatchError
from bi_patch.seams import anchors
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
    """Without GIT_CEILING_DIRECTORIES, git apply silently skips files in another repository's folders."""
    top = small.tree.parent
    subprocess.run(["git", "init", "--quiet", str(top)], check=True)
    monkeypatch.setenv("GIT_DIR", str(top / ".git"))
    apply.apply(small.tree, small.patch("ops"))
    assert (small.tree / "vllm/ops.py").read_text().endswith(series.CALL)


def readme_commands(series):
    """The shell commands of patches/README.md that apply a series."""
    text = (anchors.PATCHES / "README.md").read_text()
    (block,) = [part for part in text.split("```")[1::2] if "git apply" in part]
    assert "SERIES=/path/to/bi_patch/patches/vllm-0.33.0\n" in block
    return block.replace("/path/to/bi_patch/patches/vllm-0.33.0", str(series))


@pytest.mark.parametrize("case", ["fits", "one diff does not fit", "one diff is missing"])
def test_the_commands_of_the_readme_apply_all_or_nothing(small, case):
    subprocess.run(["git", "init", "--quiet", str(small.tree.parent)], check=True)
    if case == "one diff does not fit":
        small.change("vllm/user.py", "return scale(1)", "return scale(2)")
    elif case == "one diff is missing":
        small.patch("core-sched").unlink()
    before = contents(small.tree)
    run = subprocess.run(["sh", "-c", readme_commands(small.series)], cwd=small.tree, check=False)
    (small.tree / "series.diff").unlink()
    assert (run.returncode == 0) == (case == "fits")
    if case == "fits":
        apply.reverse_series(small.tree, paths(small))
    assert contents(small.tree) == before


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
    with pytest.raises(PatchError, match="exists already"):
        apply.patched_copy(tmp_path / "copy")
