"""The comparison of quantized products with fp64: what it lets pass, and what it finds."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.ops.cpu import machine, quantized
from bi_patch.tools.verify import precision

N, K = 96, 512


@pytest.fixture(autouse=True)
def kernels(cache):
    machine.load_kernels(cache)


@pytest.fixture
def held():
    """INT8 weight [N, K] and scales [N]."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (N, K), generator=generator).to(torch.int8)
    return weight, torch.rand(N, generator=generator) * 0.01


def layer(product):
    return SimpleNamespace(
        bias=None,
        parameters=lambda: iter([torch.empty(0)]),
        quant_method=SimpleNamespace(apply=lambda layer, x, bias: product(x, bias)),
    )


def excess(product, held, m=16, scheme="W8A8 sgl token"):
    weight, scale = held
    exact = weight.double() * scale.double()[:, None]
    return precision._quantized(layer(product), exact, scheme, torch.bfloat16, m)


@pytest.mark.parametrize("m", precision.ROWS)
def test_exact_sums_of_rounded_rows_pass(held, m):
    assert excess(quantized.integer_product(*held), held, m) < 1


def test_a_shared_scale_of_rows_and_a_wrong_scale_of_weights_are_found(held):
    product = quantized.integer_product(*held)

    def shared(x, bias):
        step = x.float().abs().amax() / 127
        return product(((x.float() / step).round() * step).to(x.dtype), bias)

    assert excess(shared, held) > 10
    assert excess(quantized.integer_product(held[0], held[1] * 1.02), held) > 3


def test_a_weight_rounded_to_the_type_of_its_activations_passes(held):
    weight = (held[0].float() * held[1][:, None]).bfloat16()
    product = quantized.dequantized_product(weight)
    exact = weight.double()
    assert precision._quantized(layer(product), exact, "W4A16 groups of 32", torch.bfloat16, 16) < 1
    assert precision._quantized(layer(product), exact.roll(1, 0), "W4A16 groups of 32", torch.bfloat16, 16) > 10
