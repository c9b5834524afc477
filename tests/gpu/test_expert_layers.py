"""On a Hopper GPU: vLLM's layers of experts of 4 bits on bi_patch's kernel give a token its bits among any others."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bi_patch.tools.models import expert_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
    ),
]
EXPERTS, TOP, GROUP = 16, 4, 128
_ORACLES = "vllm.model_executor.layers.fused_moe.oracle"


def mxfp4(monkeypatch):
    """gpt-oss's layer, of sizes that are no multiples of 128."""
    oracle = pytest.importorskip(f"{_ORACLES}.mxfp4", reason="vLLM has no such experts")
    from vllm.model_executor.layers.quantization import mxfp4 as module

    from bi_patch.seams.cuda import mxfp4 as seam

    n, k = 352, 416
    monkeypatch.setattr(oracle, "_user_moe_activation_override", lambda: None)  # there is no model
    name = "convert_gpt_oss_weight_to_mxfp4_moe_kernel_format"
    monkeypatch.setattr(module, name, seam._packed(getattr(module, name)))
    kind = module.GptOssMxfp4MoEMethod
    monkeypatch.setattr(kind, "__init__", seam._chosen(kind.__init__))
    moe = expert_layers.config(EXPERTS, TOP, k, n, "SWIGLUOAI", has_bias=True)
    method = kind(moe)
    assert method.maybe_roundup_sizes(k, n, torch.bfloat16, moe.moe_parallel_config) == (k, n)
    held = expert_layers.layer(method, moe, k, n)
    exact = [fill_floats(held, key) for key in ("w13", "w2")]
    made = {"hidden": k, "exact": exact, "expert": swiglu_of_pairs, "kernel": "PackedFloatExperts", "bytes": None}
    return SimpleNamespace(layer=held, **made)


def w4a16(monkeypatch, symmetric):
    """A layer of compressed-tensors W4A16."""
    int_wna16 = pytest.importorskip(f"{_ORACLES}.int_wna16", reason="vLLM has no such experts")
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as module,
    )

    from bi_patch.seams.cuda import packed_products as seam

    n, k = 256, 512
    for name, close in (
        ("select_wna16_moe_backend", seam._chosen),
        ("convert_to_wna16_moe_kernel_format", seam._packed),
        ("make_wna16_moe_kernel", seam._made),
    ):
        monkeypatch.setattr(module, name, close(getattr(int_wna16, name)))
    scheme = QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=symmetric, dynamic=False
    )
    moe = expert_layers.config(EXPERTS, TOP, k, n, "SILU")
    held = expert_layers.layer(module.CompressedTensorsWNA16MoEMethod(scheme, None, moe), moe, k, n)
    exact = [fill_integers(held, name, symmetric) for name in ("w13", "w2")]
    made = {"hidden": k, "exact": exact, "expert": swiglu, "kernel": "PackedExperts", "bytes": EXPERTS * n * k}
    return SimpleNamespace(layer=held, **made)


def nvfp4(monkeypatch, alone):
    """A layer of compressed-tensors NVFP4. alone: the checkpoint asks for activations in 16 bits."""
    pytest.importorskip(f"{_ORACLES}.nvfp4", reason="vLLM has no such experts")
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as module,
    )

    from bi_patch.seams.cuda import nvfp4_experts as seam

    n, k = 256, 384
    for name, close in (
        ("select_nvfp4_moe_backend", seam._chosen),
        ("convert_to_nvfp4_moe_kernel_format", seam._packed),
    ):
        monkeypatch.setattr(module, name, close(getattr(module, name)))
    moe = expert_layers.config(EXPERTS, TOP, k, n, "SILU")
    held = expert_layers.layer(module.CompressedTensorsW4A4Nvfp4MoEMethod(moe, use_a16=alone), moe, k, n)
    exact = [fill_scaled_floats(held, name) for name in ("w13", "w2")]
    expert = partial(swiglu, gates=torch.bfloat16)
    made = {"hidden": k, "exact": exact, "expert": expert, "kernel": "PackedNvFp4Experts", "bytes": None}
    return SimpleNamespace(layer=held, **made)


KINDS = {
    "MXFP4": mxfp4,
    "NVFP4, weights alone": partial(nvfp4, alone=True),
    "NVFP4, activations too": partial(nvfp4, alone=False),
    "W4A16": partial(w4a16, symmetric=True),
    "W4A16 with zero points": partial(w4a16, symmetric=False),
}


@pytest.fixture
def vllm_config():
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.v1.worker import workspace

    config = VllmConfig()
    if not workspace.is_workspace_manager_initialized():
        workspace.init_workspace_manager(torch.device("cuda"))
    with set_current_vllm_config(config), set_forward_context(None, config):
        yield config


@pytest.fixture(params=KINDS)
def layer(request, vllm_config, monkeypatch, tmp_path):
    """A layer on bi_patch's kernel with its certificates, and its weights and biases in fp64."""
    from bi_patch.ops.cuda import linear, machine, packed_experts
    from bi_patch.seams.cuda import packed_products

    machine.forbid_split_k()
    linear.define_op()
    monkeypatch.setattr(packed_experts, "_able", {})
    made = KINDS[request.param](monkeypatch)
    held, method = made.layer, made.layer.quant_method
    method.process_weights_after_loading(held)
    assert type(method.moe_kernel.fused_experts).__name__ == made.kernel
    assert made.bytes is None or (held.w13_weight.dtype, held.w13_weight.numel()) == (torch.uint8, made.bytes)
    problems = list(packed_products.problems(torch.nn.ModuleList([held])))
    found = packed_experts.certify(problems, 600, tmp_path)
    assert len(found) == 2 and all(certificate.passed for certificate in found), [one.evidence for one in found]
    assert all(len(certificate.algorithms) == len(packed_experts.runnable(problems[0])) for certificate in found)
    made.run = lambda x, weights, ids: method.apply(held, x, weights, ids, None, None).clone()
    made.routed = lambda rows: expert_layers.routed(rows, EXPERTS, TOP, made.hidden, rows)
    return made


def fill_floats(layer, name):
    """Random floats, exponents and biases. Returns the weights and the biases in fp64 [E, n, k] and [E, n]."""
    generator = torch.Generator("cuda").manual_seed(len(name))
    words = getattr(layer, f"{name}_weight").data
    words.random_(0, 256, generator=generator)
    exponent = getattr(layer, f"{name}_weight_scale").data
    exponent.copy_(torch.randint(118, 122, exponent.shape, generator=generator, device="cuda"))
    bias = getattr(layer, f"{name}_bias").data
    bias.normal_(generator=generator)
    return floats(words) * torch.exp2(exponent.double() - 127).repeat_interleave(32, 2), bias.double()


def fill_scaled_floats(layer, name):
    """Random floats, scales and numbers of experts. Returns the weights in fp64 [E, n, k]."""
    generator = torch.Generator("cuda").manual_seed(len(name))
    words = getattr(layer, f"{name}_weight_packed").data
    words.random_(0, 256, generator=generator)
    scale = getattr(layer, f"{name}_weight_scale").data
    scale.copy_(32 * (0.5 + torch.rand(scale.shape, generator=generator, device="cuda")))
    by = 32 * 2.9 * (2 * words.shape[2]) ** 0.5 * (0.5 + torch.rand(EXPERTS, generator=generator, device="cuda"))
    divides = getattr(layer, f"{name}_weight_global_scale").data
    divides.copy_(by[:, None] if divides.ndim == 2 else by)
    getattr(layer, f"{name}_input_global_scale").data.fill_(1)
    return floats(words) * scale.double().repeat_interleave(16, 2) / by.double()[:, None, None]


def floats(words):
    """The floats e2m1 of bytes [E, n, k / 2], in fp64 [E, n, k]."""
    q = torch.stack((words & 15, words >> 4), -1).flatten(2).long()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device="cuda")
    return table[q & 7] * torch.where(q > 7, -1, 1)


def fill_integers(layer, name, symmetric):
    """Random integers, scales and zero points. Returns the weights in fp64 [E, n, k]."""
    generator = torch.Generator("cuda").manual_seed(len(name))
    words = getattr(layer, f"{name}_weight_packed").data
    words.random_(-(2**31), 2**31 - 1, generator=generator)
    scale = getattr(layer, f"{name}_weight_scale").data
    scale.uniform_(0.002, 0.012, generator=generator)
    shifts = torch.arange(0, 32, 4, device="cuda")
    q = (words[..., None] >> shifts & 15).flatten(2).double()
    zero = 8
    if not symmetric:
        packed = getattr(layer, f"{name}_weight_zero_point").data  # [E, n / 8, k / group]
        packed.random_(-(2**31), 2**31 - 1, generator=generator)
        zero = (packed[:, :, None] >> shifts[:, None] & 15).flatten(1, 2).double().repeat_interleave(GROUP, 2)
    return (q - zero) * scale.double().repeat_interleave(GROUP, 2)


def swiglu_of_pairs(x, w13, w2, expert):
    """One of gpt-oss's experts of all rows, in fp64, which rounds to bf16 between its operations."""
    (first, added), (second, last) = w13, w2
    up = (x.double() @ first[expert].T + added[expert]).bfloat16().double()
    gate, up = up[:, ::2].clamp(max=7), up[:, 1::2].clamp(-7, 7)
    inner = ((up + 1) * gate * torch.sigmoid(1.702 * gate)).bfloat16().double()
    return inner @ second[expert].T + last[expert]


def swiglu(x, w13, w2, expert, gates=torch.float64):
    """An expert of all rows, in fp64, with outputs in bf16. gates: the type to which activated gates are rounded."""
    gate, up = (x.double() @ w13[expert].T).bfloat16().double().chunk(2, -1)
    inner = torch.nn.functional.silu(gate).to(gates).double() * up
    return inner.bfloat16().double() @ w2[expert].T


def test_a_token_has_its_bits_among_any_others(layer):
    given = layer.routed(600)
    want = layer.run(*given)
    for rows in (1, 2, 5, 16, 33, 64, 97, 200, 513):
        for at in (0, 600 - rows):
            part = slice(at, at + rows)
            assert torch.equal(layer.run(*(t[part].contiguous() for t in given)), want[part]), (rows, at)


def test_a_captured_graph_has_the_bits_of_eager_calls(layer):
    for rows in (1, 9, 150):
        given, other = layer.routed(rows), layer.routed(rows + 1000)
        want = layer.run(*given)
        graph, held = torch.cuda.CUDAGraph(), [t[:rows].clone() for t in other]
        layer.run(*held)
        with torch.cuda.graph(graph):
            out = layer.run(*held)
        for to, value in zip(held, given, strict=True):
            to.copy_(value)
        graph.replay()
        assert torch.equal(out, want), rows


def test_experts_are_near_fp64(layer):
    x, weights, ids = layer.routed(37)
    want = torch.zeros((37, layer.hidden), dtype=torch.float64, device="cuda")
    for expert in range(EXPERTS):
        want += layer.expert(x, *layer.exact, expert) * (weights * (ids == expert)).sum(1, keepdim=True).double()
    got = layer.run(x, weights, ids).double()
    assert float((got - want).norm() / want.norm()) < 0.01
