"""Gated delta nets in Triton: in the interpreter, any cut and company gives the same bits; they compile everywhere."""

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


def test_numerics_cuts_and_company():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "BI_PATCH": "0", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("interpreter_recurrent.py")
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) > 10, done.stderr[-3000:]
    assert not [line for line in lines if not line.startswith("ok ")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recurrent(architecture):
    step = {"STARTS": "*i32", "SLOTS": "*i32", "FRESH": "*i8"}
    strides = {"x_token": "i32", "s_slot": "i64", "s_token": "i32"}
    rows, block = dict.fromkeys(("X", "W", "STATES", "OUT"), "*bf16"), {"C": 8192, "BLOCK": 256}
    more = {"WHICH": "*i32", "requests": "i32"}
    build(recurrent._conv, rows | step | strides | more, block, architecture, num_warps=4)
    build(recurrent._keep, {"X": "*bf16", "STATES": "*bf16"} | step | strides, block, architecture, num_warps=4)
    heads = {"A": "*bf16", "B": "*bf16", "A_LOG": "*fp32", "DT_BIAS": "*bf16", "STATES": "*fp32"}
    sizes = {"H": 16, "HV": 32, "K": 128, "V": 128, "BV": 32}
    given = {"X": "*bf16", "OUT": "*bf16", "s_slot": "i64", "scale": "fp32"}
    build(recurrent._delta, heads | step | given, sizes, architecture, num_warps=4, num_stages=3)
    rows = dict.fromkeys(("X", "GATE", "WEIGHT", "OUT"), "*bf16")
    ints = dict.fromkeys(("rows", "heads", "g_row", "g_head"), "i32")
    constants = {"SIGMOID": False, "C": 128, "BLOCK": 128}
    build(recurrent._gated_norm, rows | ints | {"eps": "fp32"}, constants, architecture, num_warps=1)
