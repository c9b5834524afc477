"""How many linear layers each route serves, as the line of an armed engine says it."""

import torch
from torch.nn import Linear as TorchLinear
from torch.nn import ModuleList

from bi_patch.ops.cpu import linear, machine, quantized, routes

N, K = 64, 32


def test_layers_are_counted_by_route(cache, tmp_path, monkeypatch):
    isa = machine.load_kernels(cache)
    layers = ModuleList(TorchLinear(K, N, bias=False, device="cpu").requires_grad_(False) for _ in range(6))

    def product(x, *_):
        return torch.ops.bi_cpu.gemm(x, torch.ops.bi_cpu.gemm_pack(layers[0].weight), N, K, None)

    for layer, rows in zip(layers, (frozenset(), frozenset({1, 8}), frozenset()), strict=False):
        monkeypatch.setattr(linear, "serving", lambda certificate, rows=rows: rows)
        linear.route(layer.weight, None, product, layer, tmp_path, "test 1")
    for layer, rows in zip(layers[3:], ((1, 2), ()), strict=False):
        monkeypatch.setattr(quantized, "serving", lambda certificate, rows=rows: rows)
        quantized.route(
            layer,
            "int8",
            product,
            lambda: layers[0].weight,
            lambda: product,
            sizes=(N, K),
            dtype=torch.float32,
            bias=None,
            cache=tmp_path,
            library="test 1",
        )
    # The last layer has no route, as a norm has none.
    assert routes.counts(layers) == {f"bundled {isa}": 3, "library": 1, f"library or bundled {isa}": 1}
    assert routes.counts(layers[2]) == {f"bundled {isa}": 1}
    assert routes.counts(layers[5]) == {}
    assert isa == machine.instruction_set() in machine.kernels_digest()
