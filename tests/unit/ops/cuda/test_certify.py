"""A CUDA worker's certificates, without a GPU: all kinds are made at one moment, and each fails in its way."""

import contextlib

import pytest
import torch

from bi_patch.errors import CertificateFailed
from bi_patch.ops import certificates, row_checks
from bi_patch.ops.certificates import Tally
from bi_patch.ops.cuda import attention, certify, chunks, cublaslt, linear, machine, moe, prompts, rows, scaled_linear
from bi_patch.ops.cuda.ahead import Ahead

LINEAR = linear.Problem(8, 16, torch.bfloat16, False)
SCALED = scaled_linear.Problem(8, 128, torch.bfloat16, False, 128)
EXPERTS = moe.Problem(4, 6, 8, 2, torch.bfloat16)
ATTENTION = attention.Problem(8, 2, 128, torch.bfloat16)
CHUNKED = chunks.Problem("FLASH_ATTN 3", 8, 2, 128, 0, 16, torch.bfloat16)
ENCODED = prompts.Problem("FLASH_ATTN 3", 16, 16, 64, 0, 0, torch.bfloat16)
ROWS = row_checks.RowCheck("cuda.norm", "RMSNorm 64 bfloat16", row_checks.FEW, None, None)
KINDS = [
    "cuda.linear",
    "cuda.scaled_linear",
    "cuda.moe",
    "cuda.decode_attention",
    "cuda.attention",
    "cuda.encoder_attention",
    "cuda.norm",
]
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
        (scaled_linear, "_routes", {}),
        (moe, "_passed", {}),
        (moe, "_done", set()),
        (moe, "_known", {}),
        (attention, "_certified", {}),
        (certificates, "_warned", set()),
    ):
        monkeypatch.setattr(module, name, empty)


def stand_ins(monkeypatch, wrong=0, error=None, kinds=KINDS):
    """Replace the comparisons: of `kinds`, `wrong` outputs differ, or `error` is raised."""
    made = []

    def comparison(key_at, rows, kernel):
        def make(*given):
            made.append(given[key_at].operation)
            bad = given[key_at].operation in kinds
            if error is not None and bad:
                raise error
            tally = Tally(rows)
            tally.add(100, wrong * bad, "some differ")
            return tally.certificate(given[key_at], kernel)

        return make

    monkeypatch.setattr(linear, "compare", comparison(1, [1, 60], "cublaslt"))
    monkeypatch.setattr(scaled_linear, "_certify", comparison(1, [1, 60], "cublaslt"))
    monkeypatch.setattr(moe, "_certify", comparison(3, [1, 60], "tiles by M"))
    monkeypatch.setattr(attention, "_certify", comparison(2, [1, 60], "bundled decode"))
    monkeypatch.setattr(chunks, "_certify", comparison(2, [1500], "kept"))
    monkeypatch.setattr(prompts, "_certify", comparison(2, [1500], "kept"))
    monkeypatch.setattr(rows, "_certify", comparison(1, [1, 60], "kept"))
    return made


def run(cache):
    given = (
        [LINEAR, SCALED, LINEAR, SCALED],
        [(EXPERTS, KERNEL), (EXPERTS, KERNEL)],
        [(ATTENTION, None), (ATTENTION, None)],
        [(CHUNKED, None), (ENCODED, None)],
        [ROWS],
    )
    return certify.certify(*given, max_rows=60, library="vllm 1", cache=cache)


def test_each_kind_is_certified_once_and_kept(monkeypatch, tmp_path):
    made = stand_ins(monkeypatch)
    done = run(tmp_path)
    assert [c.key.operation for c in done] == made == KINDS
    assert all(c.passed for c in done)
    assert {c.key.operation for _, c in certificates.every(tmp_path)} == set(made)
    assert attention.serves(ATTENTION) and not moe.is_fixed(*EXPERTS.table) and LINEAR in linear.routes()


def test_what_is_made_is_rehearsed_once_and_what_is_on_disk_is_not(monkeypatch, tmp_path):
    stand_ins(monkeypatch)
    called = []
    for module in (linear, scaled_linear):
        monkeypatch.setattr(module, "_rehearse", lambda *_, name=module.OPERATION: called.append(name))
    monkeypatch.setattr(moe, "_rehearse", lambda *_: called.append(f"cuda.moe {moe.is_fixed(*EXPERTS.table)}"))

    class Rehearsal(Ahead):
        def rehearse(self, call):
            if call.__module__ in (chunks.__name__, prompts.__name__, rows.__name__):
                called.append(call.__module__)
            else:
                call()

    monkeypatch.setattr(certify, "Ahead", Rehearsal)
    run(tmp_path)
    last = [chunks.__name__, prompts.__name__, rows.__name__]
    assert called == ["cuda.moe False", "cuda.linear", "cuda.scaled_linear", *last]
    begun = certify.begin(lambda: [ROWS], "vllm 1", tmp_path)
    assert isinstance(begun, Rehearsal) and len(called) == 6


def test_a_second_process_makes_only_the_decode_kernels_anew(monkeypatch, tmp_path):
    stand_ins(monkeypatch)
    run(tmp_path)
    moe._done.clear()
    attention._certified.clear()
    made = stand_ins(monkeypatch)
    assert len(run(tmp_path)) == 7 and made == ["cuda.decode_attention"]


@pytest.mark.parametrize("failure", [{"wrong": 3}, {"error": RuntimeError("no kernel image")}])
def test_where_one_fails_another_kernel_serves_and_the_log_says_so(failure, monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(certificates._log, "warning", lambda text, *values: said.append(text % values))
    stand_ins(monkeypatch, kinds=KINDS[:4], **failure)
    assert [c.passed for c in run(tmp_path)] == [False] * 4 + [True] * 3
    assert not attention.serves(ATTENTION) and moe.is_fixed(*EXPERTS.table)
    for route in (linear.routes()[LINEAR], scaled_linear.routes()[SCALED]):
        assert route.algorithm(4) is None and not route.tiles_agree
    first = "RuntimeError: no kernel image" if "error" in failure else "some differ"
    assert len(said) == 4 and all(f"({first})" in line for line in said)
    for line, operation, kernel in zip(
        said,
        (
            "cuda.linear N=8 K=16",
            "cuda.scaled_linear N=8 K=128 e4m3 groups of 128",
            "cuda.moe E=4",
            "cuda.decode_attention heads=8/2",
        ),
        ("the bundled GEMM", "the bundled GEMM", "the fixed tile", "prefill's kernel"),
        strict=True,
    ):
        assert operation in line and line.endswith(f"{kernel} serves instead")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cuda.attention", "FLASH_ATTN 3 heads=8/2 D=128 page=16"),
        ("cuda.encoder_attention", "FLASH_ATTN 3 heads=16/16 D=64 bfloat16: some differ"),
        ("cuda.norm", "RMSNorm 64 bfloat16: some differ"),
    ],
)
def test_without_another_kernel_the_engine_stops(kind, said, monkeypatch, tmp_path):
    stand_ins(monkeypatch, wrong=3, kinds=[kind])
    with pytest.raises(CertificateFailed, match=said):
        run(tmp_path)


def test_a_size_of_experts_without_certificate_has_the_fixed_tile(monkeypatch, tmp_path):
    """Nobody certified the size; choosing its tiles fails; another kind of the same size fails."""
    stand_ins(monkeypatch)
    assert moe.is_fixed(*EXPERTS.table)

    def broken(m):
        assert not moe.is_fixed(*EXPERTS.table)
        raise KeyError(m)

    with pytest.raises(KeyError):
        moe.certify(EXPERTS, KERNEL._replace(choose=broken), 60, "vllm 1", tmp_path)
    assert moe.is_fixed(*EXPERTS.table)
    moe._passed.clear()
    gelu = EXPERTS._replace(activation="gelu", bias=True)
    assert moe.certify(gelu, KERNEL, 60, "vllm 1", tmp_path).passed and not moe.is_fixed(*EXPERTS.table)
    stand_ins(monkeypatch, wrong=1)
    assert not moe.certify(EXPERTS._replace(weighted_input=True), KERNEL, 60, "vllm 1", tmp_path).passed
    assert moe.is_fixed(*EXPERTS.table)


def test_steps_hold_rows_of_the_prompt_in_every_kind_of_cut():
    tokens = 1500
    for what, sequences in chunks.steps(tokens):
        assert all(0 <= first and first + count <= tokens and count for first, count in sequences), what
    named = dict(chunks.steps(tokens))
    assert [sum(count for _, count in named[f"chunks of {size}"]) for size in (9, 300)] == [tokens] * 2
    assert named["one row beside prompts of 9 and 10 tokens"] == [(tokens - 1, 1), (0, 9), (0, 10)]


@pytest.mark.parametrize("wrong", [False, True])
def test_prompts_are_compared_alone_and_beside_others(wrong):
    """On CPU, with a stand-in for a layer: each row is the mean of its own prompt, or also of the others."""

    def attend(q, k, v, lengths):
        parts = v.float().split(lengths)
        means = [part.mean(0, keepdim=True).expand(len(part), -1, -1) for part in parts]
        return torch.cat(means) + wrong * v.float().mean(0)

    key = prompts._key(ENCODED._replace(heads=2, key_heads=2), "vllm 1")
    made = prompts._certify(ENCODED._replace(heads=2, key_heads=2, head_size=8), attend, key, "cpu")
    assert made.passed != wrong and made.evidence.compared > 0
    assert not wrong or "a prompt of 1 tokens beside prompts of [7], flat" in made.evidence.first


def test_heads_that_the_bundled_kernel_does_not_have_need_no_certificate(monkeypatch, tmp_path):
    stand_ins(monkeypatch)
    odd = attention.Problem(8, 2, 72, torch.bfloat16)
    assert attention.certify(odd, None, "vllm 1", tmp_path) is None and not attention.serves(odd)
