"""On a Hopper GPU: experts in FP8 give a token the same bits among any others, by certificate, near fp64."""

import functools
import importlib.metadata

import pytest
import torch
from packaging.version import Version

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
    ),
]
FORMS = ({"group": 128}, {"scale": "row"}, {"scale": "expert"}, {"scale": "expert and row"})


@pytest.fixture
def kernel(monkeypatch):
    """Problem -> vLLM's kernel for it, with bi_patch's tiles."""
    fused_moe = pytest.importorskip("vllm.model_executor.layers.fused_moe.fused_moe", reason="vLLM is not installed")
    from vllm.model_executor.layers.fused_moe import override_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from bi_patch.ops.cuda import moe
    from bi_patch.seams.cuda import moe as seam

    monkeypatch.setattr(moe, "_done", set())
    monkeypatch.setattr(moe, "_passed", {})
    for name, close in (
        ("get_moe_configs", seam._configs),
        ("get_default_config", seam._default),
        ("invoke_fused_moe_triton_kernel", seam._blocks),
    ):
        monkeypatch.setattr(fused_moe, name, close(getattr(fused_moe, name)))

    def made(problem):
        shapes = (problem.experts, 2 * problem.n, problem.hidden), (problem.experts, problem.hidden, problem.n)
        block = {"block_shape": [problem.group] * 2} if problem.group else {}
        choose = functools.partial(
            fused_moe.try_get_optimal_moe_config, *shapes, problem.top_k, problem.table[2], **block
        )
        return moe.Kernel(seam._run(fused_moe.fused_experts, MoEActivation.SILU, problem), choose, override_config)

    return made


def given(problem, rows):
    from bi_patch.ops.cuda import moe

    generator = torch.Generator("cuda").manual_seed(5)
    x, w13, w2 = moe.operands(problem, rows, generator)
    scores = torch.rand(rows, problem.experts, generator=generator, device="cuda")
    weights, ids = scores.softmax(-1).topk(problem.top_k, dim=-1)
    return x, w13, w2, weights, ids.to(torch.int32)


def rounded(x, problem):
    """x after its quantization, in fp64. As in vLLM, what exceeds the largest float is that float, and with DeepGEMM
    scales of groups are powers of two."""
    from vllm.utils.deep_gemm import is_deep_gemm_e8m0_used

    wide = x.double()
    if problem.scale == "expert":
        scale = torch.full_like(wide[:, :1], 0.02)
    elif problem.group:
        parts = wide.unflatten(1, (-1, 128))
        scale = parts.abs().amax(-1, keepdim=True) / 448
        scale = torch.exp2(torch.log2(scale).ceil()) if is_deep_gemm_e8m0_used() else scale
        scale = scale.expand_as(parts).flatten(1)
    else:
        scale = wide.abs().amax(-1, keepdim=True) / 448
    return (wide / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale


def weight(held, problem, expert):
    values, scale = held[0][expert].double(), held[1][expert].double()
    if problem.group:
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: values.shape[0], : values.shape[1]]
    return values * scale


@pytest.mark.parametrize("form", FORMS, ids=[" ".join(map(str, form.values())) for form in FORMS])
def test_a_token_has_its_bits_among_any_others(kernel, form, tmp_path):
    from bi_patch.ops.cuda import moe

    problem = moe.Problem(16, 384, 1024, 4, torch.bfloat16, **form)
    made = kernel(problem)
    certificate = moe.certify(problem, made, 1024, "test", tmp_path)
    assert certificate.passed, certificate
    assert not moe.is_fixed(*problem.table)
    x, w13, w2, weights, ids = given(problem, 700)
    want = made.run(x.clone(), w13, w2, weights, ids)
    for rows in (1, 2, 5, 16, 33, 64, 97, 200, 513):
        for at in (0, 700 - rows):
            part = slice(at, at + rows)
            got = made.run(x[part].clone(), w13, w2, weights[part].contiguous(), ids[part].contiguous())
            assert torch.equal(got, want[part]), (rows, at)


@pytest.mark.parametrize("form", FORMS, ids=[" ".join(map(str, form.values())) for form in FORMS])
def test_experts_are_near_fp64(kernel, form):
    from bi_patch.ops.cuda import moe

    if form.get("scale") == "expert and row" and Version(importlib.metadata.version("vllm")) < Version("0.33"):
        pytest.skip(
            "vLLM before 0.33 takes the first expert's scale for all, and bi_patch refuses such a checkpoint there"
        )

    problem = moe.Problem(4, 384, 512, 2, torch.bfloat16, **form)
    x, w13, w2, weights, ids = given(problem, 37)
    got = kernel(problem).run(x.clone(), w13, w2, weights, ids).double()
    want = torch.zeros_like(got)
    rows = rounded(x, problem)
    for expert in range(problem.experts):
        gate, up = (rows @ weight(w13, problem, expert).T).bfloat16().chunk(2, dim=-1)
        inner = (torch.nn.functional.silu(gate.float()) * up.float()).bfloat16()
        out = rounded(inner, problem) @ weight(w2, problem, expert).T
        want += out * (weights * (ids == expert)).sum(1, keepdim=True).double()
    assert float((got - want).norm() / want.norm()) < 0.03
