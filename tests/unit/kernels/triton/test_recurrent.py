"""The gated norms of recurrent layers in Triton: right in the interpreter, alone and in a batch; they compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from bi_patch.kernels.triton import recurrent  # noqa: E402

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
ROOT = Path(__file__).resolve().parents[4]


def build(function, signature, constants, architecture, **options):
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def test_numerics_and_company():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "BI_PATCH": "0", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("interpreter_recurrent.py")
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=900)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 12, done.stderr[-3000:]
    assert not [line for line in lines if not line.startswith("ok ")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gated_norms(architecture):
    rows = dict.fromkeys(("X", "GATE", "WEIGHT", "OUT"), "*bf16")
    ints = dict.fromkeys(("rows", "heads", "g_row", "g_head"), "i32")
    for first, size, warps in ((False, 128, 4), (True, 8192, 8)):
        constants = {"SIGMOID": False, "FIRST": first, "C": size, "BLOCK": size, "ROWS": max(1, 1024 // size)}
        build(recurrent._gated_norm, rows | ints | {"eps": "fp32"}, constants, architecture, num_warps=warps)
