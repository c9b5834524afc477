"""The identity of the code: the same for the same sources wherever they lie, another when any of them changes."""

import shutil

import pytest

from bi_patch import sources


@pytest.fixture
def copy(tmp_path):
    """A copy of the package as an installation has it: no links, and compiled files beside the sources."""
    folder = tmp_path / "site-packages" / "bi_patch"
    shutil.copytree(sources._ROOT, folder)
    (folder / "__pycache__" / "extra.cpython-311.pyc").parent.mkdir(exist_ok=True)
    (folder / "__pycache__" / "extra.cpython-311.pyc").write_bytes(b"compiled")
    return folder


def test_processes_and_installations_of_the_same_code_agree(run_python, copy):
    assert sources._digest(copy) == sources.digest()
    code = "import bi_patch_entry\nfrom bi_patch import sources\nprint(sources._digest(sources.Path({!r})))"
    assert run_python(code.format(str(sources._ROOT)), PYTHONHASHSEED="7").stdout.strip() == sources.digest()


@pytest.mark.parametrize("name", ["seams/linear.py", "kernels/cpu/csrc/gemm.cpp", "kernels/triton/norm.py"])
def test_a_changed_source_changes_it(copy, name):
    with open(copy / name, "a") as file:
        file.write(" ")
    assert sources._digest(copy) != sources.digest()


def test_a_renamed_source_changes_it(copy):
    (copy / "seams" / "linear.py").rename(copy / "seams" / "linear2.py")
    assert sources._digest(copy) != sources.digest()


def test_it_keys_vllms_compile_caches(monkeypatch):
    from bi_patch.seams import compilation

    keyed = compilation._hash(lambda self: "stock" * 2)
    first = keyed(None)
    monkeypatch.setattr(sources, "digest", lambda: "another bi_patch")
    assert len(first) == 10 and first not in ("stock" * 2, keyed(None))
