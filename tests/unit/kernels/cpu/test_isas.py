"""The same kernel sources, built in child processes for other instruction sets and with another order."""

import hashlib
from pathlib import Path

import pytest

from bi_patch.kernels.cpu import runnable_isas


def same_wide(a: dict, b: dict) -> bool:
    """Whether all digests but those of bf16 are equal."""
    return [a["wide"], a["leaves"]] == [b["wide"], b["leaves"]]


# Code without vector instructions takes minutes. Of the other ISAs, avx2 is the one that differs most from the best.
@pytest.mark.parametrize(
    "other", [pytest.param(isa, marks=[pytest.mark.slow] * (isa != "avx2")) for isa in runnable_isas()[1:]]
)
def test_fp32_and_fp16_bits_are_the_same_on_every_isa(isa, answers, other):
    assert same_wide(answers(other), answers())


@pytest.mark.parametrize("other", [isa for isa in runnable_isas()[1:] if isa not in ("avx2", "portable")])
def test_the_code_of_every_isa_with_512_bits_gives_the_same_bits(isa, answers, other):
    assert same_wide(answers(other, quick=True), answers())


def test_a_wrong_order_is_noticed(isa, answers):
    """Leaves of 128 cut the sums at other places, so rows that see a second leaf must differ."""
    right, wrong = answers()["leaves"], answers(None, "-DBI_LEAF=128", quick=True)["leaves"]
    assert right[0] == wrong[0]
    assert all(a != b for a, b in zip(right[1:], wrong[1:], strict=True))


def test_amx_tiles_emulated(isa, answers):
    """The code of tiles with its instructions emulated in C++: this tests indices, edges and invariance.

    On a machine with AMX, the emulation must also have the bits of the tiles, in bf16 too.
    """
    if "avx512_bf16" not in runnable_isas():
        pytest.skip("the code around the tiles needs AVX512_BF16")
    header = Path(__file__).with_name("amx_emulation.h")
    digest = hashlib.sha256(header.read_bytes()).hexdigest()  # the library's name has to tell another emulation
    flags = ("-include", str(header), f"-DEMULATION=0x{digest[:8]}")
    emulated = answers("amx_bf16", *flags, quick=True)
    assert same_wide(emulated, answers())
    if isa == "amx_bf16":
        assert emulated["bf16"] == answers()["bf16"]
