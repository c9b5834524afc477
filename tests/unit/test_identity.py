"""The identity of the code: the same for the same sources wherever they lie, another when any of them changes."""

import shutil

import pytest

from bi_patch import identity


@pytest.fixture
def copy(tmp_path):
    """A copy of the package as an installation has it: no links, and compiled files beside the sources."""
    folder = tmp_path / "site-packages" / "bi_patch"
    shutil.copytree(identity._ROOT, folder)
    (folder / "__pycache__" / "extra.cpython-311.pyc").parent.mkdir(exist_ok=True)
    (folder / "__pycache__" / "extra.cpython-311.pyc").write_bytes(b"compiled")
    return folder


def test_processes_and_installations_of_the_same_code_agree(run_python, copy):
    assert identity._digest(copy) == identity.digest()
    code = (
        "import bi_patch_entry; bi_patch_entry.without_arming()\n"
        "from bi_patch import identity\nprint(identity._digest(identity.Path({!r})))"
    )
    assert run_python(code.format(str(identity._ROOT)), PYTHONHASHSEED="7").stdout.strip() == identity.digest()


@pytest.mark.parametrize("name", ["seams/cuda/linear.py", "kernels/cpu/csrc/gemm.cpp", "kernels/triton/norm.py"])
def test_a_changed_source_changes_it(copy, name):
    with open(copy / name, "a") as file:
        file.write(" ")
    assert identity._digest(copy) != identity.digest()


@pytest.mark.parametrize("name", ["tools/cli/status.py", "tools/verify/report.py", "training/logprobs.py", "errors.py"])
def test_code_that_never_serves_does_not(copy, name):
    with open(copy / name, "a") as file:
        file.write("# another help text\n")
    assert identity._digest(copy) == identity.digest()


def test_a_renamed_source_changes_it(copy):
    (copy / "seams" / "cuda" / "linear.py").rename(copy / "seams" / "cuda" / "linear2.py")
    assert identity._digest(copy) != identity.digest()


def test_it_keys_vllms_compile_caches(monkeypatch):
    from bi_patch.seams.common import compilation

    keyed = compilation._hash(lambda self: "stock" * 2)
    first = keyed(None)
    monkeypatch.setattr(identity, "digest", lambda: "another bi_patch")
    assert len(first) == 10 and first not in ("stock" * 2, keyed(None))
