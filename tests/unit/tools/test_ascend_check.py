"""`bi-patch ascend-check` without an NPU, on stand-ins: kernels that keep a row's bits, and a kernel that does not."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from bi_patch.errors import SettingError
from bi_patch.ops.ascend import machine
from bi_patch.tools import ascend_check
from bi_patch.tools.cli import app, ascend, status  # noqa: F401  two commands, so that each has its name

CASES = ("matmul with bias", "rms_norm with residual", "log_softmax", "softmax", "sum", "attention")


def by_row(function, x):
    """Apply `function` to each row in fp64, so that no row depends on another row."""
    return torch.stack([function(row.double()) for row in x])


def matmul(x, w, chip, bias):
    return by_row(lambda row: row @ w[0].double() + bias.double(), x[0])[None].to(x.dtype)


def rms_norm(x, weight, eps, chip, residual):
    def norm(row):
        return row * (row.square().mean() + eps).rsqrt() * weight.double()

    return by_row(norm, x + residual).to(x.dtype), x + residual


def softmax(x, chip, dtype=None, log=False):
    return by_row(lambda row: row.log_softmax(-1) if log else row.softmax(-1), x).to(dtype or x.dtype)


def total(x, chip):
    return by_row(lambda row: row.sum(), x).to(x.dtype)


def attention(q, k, v, queries, keys, scale, chip, causal):
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))

    def attend(row):
        p = (torch.einsum("hd,shd->hs", row, k) * scale).softmax(-1)
        return torch.einsum("hs,shd->hd", p, v)

    return by_row(attend, q).to(q.dtype)


@pytest.fixture
def npu(monkeypatch):
    """A machine whose NPU is the CPU, with these kernels; returns the module of row kernels."""
    modules = {
        "matmul": SimpleNamespace(matmul=matmul),
        "rows": SimpleNamespace(rms_norm=rms_norm, softmax=softmax, total=total),
        "attention": SimpleNamespace(attention=attention),
    }
    package = ModuleType("bi_patch.kernels.ascend")
    for name, module in modules.items():
        setattr(package, name, module)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(machine, "require", lambda: None)
    monkeypatch.setattr(machine, "chip", lambda: SimpleNamespace(name="Ascend910B3"))
    monkeypatch.setattr(ascend_check.importlib.metadata, "version", lambda name: f"{name} 1")
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, where, *more: t if where == "npu" else to(t, where, *more))
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    return modules["rows"]


def run(*arguments):
    done = CliRunner().invoke(app, ["ascend-check", *arguments])
    return done.exit_code, json.loads(done.stdout)


def test_kernels_that_keep_a_rows_bits_pass(npu):
    code, found = run("--rows", "3")
    assert code == 0, found
    assert {name: found[name] for name in found if name != "rows"} == {
        "device": "Ascend910B3",
        "torch": "torch 1",
        "torch-npu": "torch-npu 1",
        "triton-ascend": "triton-ascend 1",
    }
    assert [row["case"] for row in found["rows"]] == [
        f"{name} {dtype}" for dtype in ("bfloat16", "float16", "float32") for name in CASES
    ]
    # 1, 2 and 3 rows of 512 columns.
    assert found["rows"][0]["compared"] == (1 + 2 + 3) * 512
    assert all(row["ok"] and row["differing"] == 0 for row in found["rows"])


def test_a_kernel_whose_bits_follow_the_number_of_rows_is_named(npu, monkeypatch):
    monkeypatch.setattr(npu, "total", lambda x, chip: total(x, chip) * (1 + 2**-7 * (len(x) == 2)))
    code, found = run("--rows", "3")
    wrong = [row for row in found["rows"] if not row["ok"]]
    assert code == 1 and [row["case"] for row in wrong] == [f"sum {t}" for t in ("bfloat16", "float16", "float32")]
    assert all(row["differing"] == 2 for row in wrong)


def test_a_kernel_that_is_wrong_for_all_rows_is_named(npu, monkeypatch):
    monkeypatch.setattr(npu, "total", lambda x, chip: total(x, chip) * 2)
    code, found = run("--rows", "3")
    assert code == 1 and all(row["differing"] == 0 and row["error"] > 0.9 for row in found["rows"] if not row["ok"])


def test_no_rows_is_an_error():
    with pytest.raises(SettingError, match="0 rows"):
        ascend_check.check(0)
