"""Quantized heads, and layers of AutoRound, on CUDA: which kernels count as those of linears, and what is refused."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cuda import quantized


class LinearBase(torch.nn.Module):
    """A stand-in of vLLM's class."""


class ParallelLMHead(torch.nn.Module):
    """A stand-in of vLLM's class."""


class Unquantized:
    pass


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    for name, held in (
        ("linear", {"LinearBase": LinearBase, "UnquantizedLinearMethod": Unquantized}),
        ("vocab_parallel_embedding", {"UnquantizedEmbeddingMethod": Unquantized}),
    ):
        module = ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, f"vllm.model_executor.layers.{name}", module)


def model(kind, method):
    made = torch.nn.Module()
    made.lm_head = kind()
    made.lm_head.quant_method = method
    return made


def holding(name):
    return SimpleNamespace(kernel=type(name, (), {})())


@pytest.mark.parametrize("name", ["MacheteLinearKernel", "MarlinLinearKernel", "CutlassFP8ScaledMMLinearKernel"])
def test_a_head_on_a_kernel_that_bi_patch_replaces_has_a_route(name):
    made = model(ParallelLMHead, holding(name))
    quantized.check(made)
    ((where, layer, kernel),) = quantized.layers(made, (name,))
    assert where == "lm_head" and layer is made.lm_head and type(kernel).__name__ == name


@pytest.mark.parametrize("name", [quantized.INT8, quantized.NVFP4, "ExllamaLinearKernel"])
def test_a_head_on_another_kernel_is_refused_by_name(name):
    with pytest.raises(UnsupportedFeature, match=f"linear.cuda_quantized: lm_head runs on {name}"):
        quantized.check(model(ParallelLMHead, holding(name)))
    if name in quantized.KERNELS:
        quantized.check(model(LinearBase, holding(name)))


def test_an_unquantized_head_is_none_of_them():
    made = model(ParallelLMHead, Unquantized())
    quantized.check(made)
    assert not list(quantized._all(made))


def test_the_kernel_of_autoround_is_found_behind_its_scheme():
    inner = holding("MacheteLinearKernel")
    made = model(LinearBase, SimpleNamespace(scheme=SimpleNamespace(linear_method=inner)))
    quantized.check(made)
    ((_, _, kernel),) = quantized.layers(made, ("MacheteLinearKernel",))
    assert kernel is inner.kernel
