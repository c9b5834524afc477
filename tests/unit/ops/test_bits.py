"""Tests of bits.differing, which counts the elements that differ in any bit, and of bits.checksum."""

import pytest
import torch

from bi_patch.ops import bits
from bi_patch.ops.bits import differing

FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zeros_of_both_signs_differ_and_the_same_nan_does_not(dtype):
    a = torch.tensor([0.0, 1.0, 2.0, float("nan")]).to(dtype)
    b = torch.tensor([-0.0, 1.0, 3.0, float("nan")]).to(dtype)
    assert differing(a, a.clone()) == 0
    assert differing(a, b) == 2


def test_another_nan_differs():
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert differing(nans[:1], nans[1:]) == 1


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers(dtype):
    a, b = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([1, 1, 0]).to(dtype)
    assert differing(a, a.clone()) == 0
    assert differing(a, b) == 2


def test_strides_do_not_matter():
    held = torch.randn(6, 8)
    assert differing(held.t(), held.t().contiguous()) == 0
    assert differing(held[:, ::2], held[:, 1::2]) == 24
    assert differing(held[:0], held[:0]) == 0
    assert differing(torch.tensor(1.0), torch.tensor(2.0)) == 1


def test_equal_tensors_are_read_once(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__ne__", lambda *_: pytest.fail("compared again"))
    assert differing(torch.ones(4), torch.ones(4)) == 0


@pytest.mark.parametrize("other", [torch.zeros(3), torch.zeros(1, 4), torch.zeros(4, dtype=torch.int32)])
def test_another_shape_or_dtype_is_an_error(other):
    with pytest.raises(ValueError, match="cannot compare"):
        differing(torch.zeros(4), other)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 4093 * 4, 4093 * 8 + 5])
def test_a_checksum_tells_of_each_element_and_of_its_place(count):
    values = torch.arange(count).to(torch.int16).view(torch.bfloat16)
    known = bits.checksum(values)
    assert bits.checksum(values.clone().view(1, -1)) == known
    for at in {0, count // 2, count - 1} if count else ():
        other = values.clone()
        other.view(torch.int16)[at] += 1
        assert bits.checksum(other) != known
    if count > 1:
        assert bits.checksum(values.flip(0)) != known


def test_a_checksum_tells_of_another_order_of_the_same_words():
    values = torch.randn(64, 32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert bits.checksum(values.transpose(0, 1)) != bits.checksum(values)
    assert bits.checksum(values.view(64, 32, 32, 2).transpose(1, 2)) != bits.checksum(values)


def test_checksums_of_several_tensors_are_those_of_each():
    values = [torch.randn(n).to(dtype) for n, dtype in ((0, torch.float32), (3, torch.bfloat16), (9000, torch.float64))]
    assert bits.checksums(values) == [bits.checksum(value) for value in values]
    assert bits.checksums([]) == []


def test_the_total_of_several_comparisons():
    a = torch.tensor([0.0, 1.0, 2.0])
    b = torch.tensor([-0.0, 1.0, 3.0])
    assert bits.total(bits.count(x, y) for x, y in ((a, a), (a, b), (b, b), (b, a))) == 4
    assert bits.total([]) == 0
