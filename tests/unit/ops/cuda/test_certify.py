"""A CUDA worker's certificates, without a GPU: all three kinds are made at one moment and fail in one way."""

import contextlib

import pytest
import torch

from bi_patch.ops import certificates
from bi_patch.ops.certificates import Tally
from bi_patch.ops.cuda import attention, certify, cublaslt, linear, machine, moe

LINEAR = linear.Problem(8, 16, torch.bfloat16, False)
EXPERTS = moe.Problem(4, 6, 8, 2, torch.bfloat16)
ATTENTION = attention.Problem(8, 2, 128, torch.bfloat16)
KERNEL = moe.Kernel(None, lambda m: {"BLOCK_SIZE_M": 16 if m < 9 else 64}, contextlib.nullcontext)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """Make this process look as if it had certified nothing and had no device."""
    for name in ("device", "libraries"):
        monkeypatch.setattr(machine, name, lambda: "none")
    monkeypatch.setattr(machine, "kernels_digest", lambda kind="triton": kind)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(cublaslt, "Gemm", lambda *_: None)
    for module, name, empty in (
        (linear, "_routes", {}),
        (moe, "_fixed", set()),
        (moe, "_done", set()),
        (attention, "_certified", {}),
        (certificates, "_warned", set()),
    ):
        monkeypatch.setattr(module, name, empty)


def stand_ins(monkeypatch, wrong=0, error=None):
    """Replace the three comparisons: `wrong` outputs differ, or `error` is raised."""
    made = []

    def comparison(key_at, rows, kernel):
        def make(*given):
            made.append(given[key_at].operation)
            if error is not None:
                raise error
            tally = Tally(rows)
            tally.add(100, wrong, "some differ")
            return tally.certificate(given[key_at], kernel)

        return make

    monkeypatch.setattr(linear, "_certify", comparison(1, [1, 60], "cublaslt"))
    monkeypatch.setattr(moe, "_certify", comparison(3, [1, 60], "tiles by M"))
    monkeypatch.setattr(attention, "_certify", comparison(2, [1, 60], "bundled decode"))
    return made


def run(cache):
    given = ([LINEAR, LINEAR], [(EXPERTS, KERNEL), (EXPERTS, KERNEL)], [(ATTENTION, None), (ATTENTION, None)])
    return certify.certify(*given, max_rows=60, library="vllm 1", cache=cache)


def test_each_kind_is_certified_once_and_kept(monkeypatch, tmp_path):
    made = stand_ins(monkeypatch)
    done = run(tmp_path)
    assert [c.key.operation for c in done] == made == ["cuda.linear", "cuda.moe", "cuda.decode_attention"]
    assert all(c.passed for c in done)
    assert {c.key.operation for _, c in certificates.every(tmp_path)} == set(made)
    assert attention.serves(ATTENTION) and not moe.is_fixed(*EXPERTS.table) and LINEAR in linear.routes()


def test_a_second_process_makes_only_the_decode_kernels_anew(monkeypatch, tmp_path):
    stand_ins(monkeypatch)
    run(tmp_path)
    moe._done.clear()
    attention._certified.clear()
    made = stand_ins(monkeypatch)
    assert len(run(tmp_path)) == 3 and made == ["cuda.decode_attention"]


@pytest.mark.parametrize("failure", [{"wrong": 3}, {"error": RuntimeError("no kernel image")}])
def test_where_one_fails_another_kernel_serves_and_the_log_says_so(failure, monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(certificates._log, "warning", lambda text, *values: said.append(text % values))
    stand_ins(monkeypatch, **failure)
    assert not any(c.passed for c in run(tmp_path))
    assert not attention.serves(ATTENTION) and moe.is_fixed(*EXPERTS.table)
    assert linear.routes()[LINEAR].algorithm(4) is None and not linear.routes()[LINEAR].tiles_agree
    first = "RuntimeError: no kernel image" if "error" in failure else "some differ"
    assert len(said) == 3 and all(f"({first})" in line for line in said)
    for line, operation, kernel in zip(
        said,
        ("cuda.linear N=8 K=16", "cuda.moe E=4", "cuda.decode_attention heads=8/2"),
        ("the bundled GEMM", "the fixed tile", "prefill's kernel"),
        strict=True,
    ):
        assert operation in line and line.endswith(f"{kernel} serves instead")


def test_heads_that_the_bundled_kernel_does_not_have_need_no_certificate(monkeypatch, tmp_path):
    stand_ins(monkeypatch)
    odd = attention.Problem(8, 2, 72, torch.bfloat16)
    assert attention.certify(odd, None, "vllm 1", tmp_path) is None and not attention.serves(odd)
