"""Named errors of the operations on Ascend, on a machine without Ascend's libraries."""

import importlib.metadata
import importlib.util

import pytest

from bi_patch.errors import BiPatchError, MissingDependency, UnsupportedDevice
from bi_patch.kernels.ascend import chips
from bi_patch.ops.ascend import machine

VERSIONS = {"torch-npu": "2.13.0", "triton-ascend": "3.2.0"}


@pytest.fixture
def installed(monkeypatch):
    """The installed distributions and their versions, which a test may change. torch_npu can be imported; the AscendC
    package is not installed."""
    versions = dict(VERSIONS)

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    monkeypatch.setattr(machine, "ascendc_installed", lambda: False)
    return versions


def test_all_there(installed):
    machine.require()


@pytest.mark.parametrize("name", VERSIONS)
def test_a_missing_library_is_named_with_what_to_install(installed, name):
    del installed[name]
    with pytest.raises(MissingDependency, match=f"{name} is not installed: pip install {name}=="):
        machine.require()


@pytest.mark.parametrize("name", VERSIONS)
def test_another_version_is_named(installed, name):
    installed[name] = "9.9"
    with pytest.raises(MissingDependency, match=f"{name} 9.9 was not checked.*pip install {name}=="):
        machine.require()


def test_missing_cann_is_named(installed, monkeypatch):
    def fail(name):
        raise ImportError("libascendcl.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(MissingDependency, match="libascendcl.so.*install the CANN toolkit"):
        machine.require()


def test_an_unknown_chip_is_named(monkeypatch):
    with pytest.raises(chips.UnknownChip, match="'Ascend310P3'.*Ascend910B3"):
        chips.find("Ascend310P3")
    assert issubclass(UnsupportedDevice, BiPatchError)


def test_what_orders_a_sum_depends_on_no_chip_and_no_number_of_rows():
    for size in (2, 4):
        depths = {chips.matmul_tile(c, rows, size).k for c in chips.CHIPS.values() for rows in (1, 17, 64, 9000)}
        assert len(depths) == 1


def test_tiles_fit():
    for chip in chips.CHIPS.values():
        for rows in (1, 33, 4096):
            for size in (2, 4):
                tile = chips.matmul_tile(chip, rows, size)
                assert tile.m * tile.n * 4 <= chip.l0c * 1024
                assert 2 * tile.m * tile.k * size <= chip.l0a * 1024 and 2 * tile.n * tile.k * size <= chip.l0b * 1024
        for head in (64, 128, 256):
            assert chips.attention_rows(chip, 5, head) >= 16


TAKEN = {
    "npu_mm_batch_invariant": "(Tensor a, Tensor b) -> Tensor",
    "npu_matmul_batch_invariant": "(Tensor a, Tensor b) -> Tensor",
    "npu_reduce_sum_batch_invariant": "(Tensor x, int dim, bool keepdim=False) -> Tensor",
    "npu_fused_infer_attention_score_batch_invariant": (
        "(Tensor query, Tensor key, Tensor value, *, Tensor? atten_mask=None, SymInt[]? actual_seq_lengths=None, "
        "SymInt[]? actual_seq_lengths_kv=None, Tensor? block_table=None, int num_heads=1, float scale=1., "
        'str input_layout="BSH", int num_key_value_heads=0, int sparse_mode=0, int block_size=0) -> (Tensor, Tensor)'
    ),
}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"npu_reduce_sum_batch_invariant": "(Tensor x, int[1]? dim=None, bool keepdim=False) -> Tensor"},
        {"npu_mm_batch_invariant": "(Tensor a, Tensor b, Tensor bias) -> Tensor"},
        {"npu_matmul_batch_invariant": "(Tensor a, Tensor b) -> (Tensor, Tensor)"},
        {"npu_reduce_sum_batch_invariant": "(Tensor x, bool keepdim=False) -> Tensor"},
        {"npu_reduce_sum_batch_invariant": "(Tensor x, int[] dim, bool keepdim=False) -> Tensor"},
        {"npu_fused_infer_attention_score_batch_invariant": "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)"},
        {"npu_mm_batch_invariant": None},
    ],
)
def test_schemas_of_the_ascendc_package(monkeypatch, changed):
    import types

    import torch

    schemas = {name: text for name, text in (TAKEN | changed).items() if text}

    def packet(name, text):
        schema = torch._C.parse_schema(f"batch_invariant_ops::{name}{text}")
        return types.SimpleNamespace(overloads=lambda: ["default"], default=types.SimpleNamespace(_schema=schema))

    space = types.SimpleNamespace(**{name: packet(name, text) for name, text in schemas.items()})
    monkeypatch.setattr(torch, "ops", types.SimpleNamespace(batch_invariant_ops=space))
    monkeypatch.setattr(machine, "ascendc_installed", lambda: True)
    monkeypatch.setattr(machine.importlib, "import_module", lambda name: None)
    machine.ascendc.cache_clear()
    try:
        if all("int[1]" in (text or "") for text in changed.values()):
            assert set(machine.ascendc()) == set(machine.SCHEMAS)
        else:
            with pytest.raises(MissingDependency, match=next(iter(changed))):
                machine.ascendc()
    finally:
        machine.ascendc.cache_clear()


def test_importing_everything_is_harmless_without_the_libraries(run_python):
    code = (
        "import bi_patch, sys\n"
        "from bi_patch.ops.ascend import dispatch, machine, rotary\n"
        "from bi_patch import seams\n"
        "assert not {'torch', 'torch_npu', 'triton'} & set(sys.modules), 'loaded too much'\n"
        "assert len(dispatch.SERVED) > 40"
    )
    done = run_python(code, BI_PATCH="0")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed here")
def test_install_without_torch_npu_is_a_named_error(run_python):
    code = "from bi_patch.ops.ascend import dispatch\ndispatch.install()"
    done = run_python(code, BI_PATCH="0")
    assert "MissingDependency: torch-npu is not installed" in done.stderr
