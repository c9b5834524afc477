"""Row-parallel layers on CUDA in fixed parts of K: what the seam calls, and how roots reach all ranks (doubles)."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import CertificateFailed, UnsupportedFeature
from bi_patch.kernels.triton import gemm
from bi_patch.kernels.triton import leaves as kernels
from bi_patch.ops.cpu.leaves import tree
from bi_patch.ops.cuda import leaves as ops
from bi_patch.ops.cuda import linear
from bi_patch.seams import active, leaves
from bi_patch.seams.cuda import leaves as seam

FORWARD = seam.SEAM.close


def product(x, weight, bias, count, dtype):
    """The bundled kernel's order, by PyTorch."""
    total = tree([a.float() @ b.float().T for a, b in zip(x.chunk(count, 1), weight.chunk(count, 1), strict=True)])
    return (total if bias is None else total + bias.float()).to(dtype)


def summed(parts, bias, dtype):
    return (tree(parts.unbind()) + (0 if bias is None else bias.float())).to(dtype)


@pytest.fixture(autouse=True)
def doubles(monkeypatch):
    monkeypatch.setattr(kernels, "product", product)
    monkeypatch.setattr(kernels, "tree", summed)
    monkeypatch.setattr(ops, "_ranks", None)
    monkeypatch.setattr(active, "leaves", 8)


def made():
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in ((3, 5, 256), (32, 256), (32,))]


def test_every_number_of_ranks_has_the_bits_of_one():
    x, weight, bias = made()
    want = ops.row_parallel(x, weight, bias, 8, 1)
    assert want.shape == (3, 5, 32) and want.dtype == torch.bfloat16
    for ranks in (2, 4, 8):
        parts = list(zip(x.chunk(ranks, -1), weight.chunk(ranks, -1)))
        roots = torch.stack([product(a.reshape(15, -1), b, None, 8 // ranks, torch.float32) for a, b in parts])

        def gather(out, own, roots=roots):
            assert any(torch.equal(own, root.view(-1)) for root in roots)
            out.copy_(roots.view(len(roots), -1))

        ops.connect(ops.Ranks(lambda own, roots=roots: roots[0] + roots[1], gather))
        for a, b in parts:
            assert torch.equal(ops.row_parallel(a.contiguous(), b.contiguous(), bias, 8 // ranks, ranks), want)


@pytest.mark.parametrize(
    "cut", [lambda x: x[..., 1:257], lambda x: x[..., :512:2], lambda x: x.view(-1)[1:3841].view(15, 256)]
)
def test_rows_that_tensor_descriptors_do_not_fit_are_copied(cut, monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "product", lambda x, *given: (seen.append(x), product(x, *given))[1])
    x = cut(torch.randn((15, 520), generator=torch.Generator().manual_seed(4)).bfloat16())
    _, weight, bias = made()
    assert torch.equal(ops.row_parallel(x, weight, bias, 8, 1), product(x, weight, bias, 8, x.dtype))
    assert linear.packed(seen[0], 256) and gemm.can_describe(seen[0])
    aligned = x.clone(memory_format=torch.contiguous_format)
    ops.row_parallel(aligned, weight, bias, 8, 1)
    assert seen[1].data_ptr() == aligned.data_ptr()


def test_other_types_and_a_process_without_ranks_are_refused():
    x, weight, bias = made()
    with pytest.raises(CertificateFailed, match="no product of torch.float32 rows"):
        ops.row_parallel(x.float(), weight.float(), bias, 8, 1)
    with pytest.raises(CertificateFailed, match="no other ranks"):
        ops.row_parallel(x, weight, bias, 4, 2)


def layer(**changes):
    given = dict(
        tp_size=2,
        tp_rank=1,
        input_size=512,
        input_is_parallel=True,
        skip_bias_add=False,
        bias="bias",
        weight="weight",
        return_bias=True,
        reduce_results=True,
        quant_method=type("UnquantizedLinearMethod", (), {})(),
        prefix="model.layers.0.mlp.down_proj",
    )
    return SimpleNamespace(**given | changes)


def test_the_layer_gives_the_whole_sum(monkeypatch):
    forward = FORWARD(lambda self, x: "vLLM's")
    monkeypatch.setattr(torch.ops.bi_patch, "row_parallel", lambda *given: given, raising=False)
    assert forward(layer(), "x") == (("x", "weight", "bias", 4, 2), None)
    assert forward(layer(skip_bias_add=True), "x") == (("x", "weight", None, 4, 2), "bias")
    assert forward(layer(return_bias=False, tp_size=1), "x") == ("x", "weight", "bias", 8, 1)
    (x, *_), _ = forward(layer(input_is_parallel=False), torch.arange(6.0).view(1, 6))
    assert x.tolist() == [[3, 4, 5]]
    monkeypatch.setattr(active, "leaves", 0)
    assert forward(layer(), "x") == "vLLM's"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"quant_method": object()}, "object is not covered"),
        ({"input_size": 768 - 384}, ""),
        ({"input_size": 320}, "a leaf of 40 elements of K is no multiple of 16 above 16"),
        ({"input_size": 128}, "a leaf of 16 elements of K is no multiple of 16 above 16"),
        *(
            ({"weight": weight}, "the rows of a weight have gaps or no aligned address")
            for weight in (torch.zeros(256, 4).T, torch.zeros(4, 257)[:, :256], torch.zeros(257)[1:].view(1, 256))
        ),
        ({"input_size": 516}, "cannot be cut into 8 equal parts"),
        ({"reduce_results": False}, "whose ranks' parts the model adds by itself"),
    ],
)
def test_layers_are_checked_before_the_engine_serves(changes, said, monkeypatch):
    connected = []
    monkeypatch.setattr(seam, "_connect", lambda: connected.append(True))
    monkeypatch.setattr(leaves, "is_row_parallel", lambda layer: layer is not model)
    monkeypatch.setattr(leaves, "one_zero", lambda model: None)
    changes = {"weight": torch.zeros(4, 256)} | changes
    model = SimpleNamespace(modules=lambda: iter((model, layer(**changes))))
    if not said:
        seam.prepare(model)
        assert connected
        return
    with pytest.raises(UnsupportedFeature, match=said):
        seam.prepare(model)


def test_roots_of_trees_are_added_as_other_large_messages_are(monkeypatch):
    from bi_patch.ops.cuda import ranks
    from bi_patch.seams.cuda import adder, communicator

    held = SimpleNamespace(ca_comm="one-stage", _bi_patch_adder="NCCL")
    group = SimpleNamespace(world_size=2, device_communicator=held)
    monkeypatch.setattr("vllm.distributed.parallel_state.get_tp_group", lambda: group)
    monkeypatch.setattr(communicator, "carrier", lambda communicator: SimpleNamespace(gather="gather"))
    monkeypatch.setattr(ranks, "all_reduce", lambda x, own, carrier, adds: (x, own, adds))
    monkeypatch.setattr(ops, "_ranks", None)
    seam._connect()
    assert adder.adder(held) == "NCCL" and ops._ranks.add("x") == ("x", "one-stage", "NCCL")
