"""Calls each spelling of an operation on npu:0 and prints JSON lines with the outcome.

`served`: bi_patch computed the result, which agrees with the CPU's in fp64. `refused`: bi_patch raised
UnsupportedFeature with the operator's name. `native`: the call reached torch_npu's own kernel, which fails on the stub.
`wrong`: the result does not agree. With the argument `stock`, bi_patch's operators are not installed.
"""

import json
import sys
from collections import Counter

import canonical
import host_ops
import torch
import torch_npu

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops.ascend import dispatch

F = torch.nn.functional
npu, vendor = torch_npu, torch.ops.npu
torch.manual_seed(1)
X, W, B, C = torch.randn(4, 8), torch.randn(8, 8), torch.randn(8), torch.randn(4, 8)
Q, K, V = (torch.randn(n, h * 16) for n, h in ((5, 4), (5, 2), (5, 2)))
LENGTHS = {"actual_seq_lengths": [2, 5], "actual_seq_lengths_kv": [2, 5]}
HEADS = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": "TND", "scale": 0.25, "sparse_mode": 3}
HEADS_2 = {
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "input_layout": "TND",
    "softmax_scale": 0.25,
    "sparse_mode": 3,
    "actual_seq_qlen": [2, 5],
    "actual_seq_kvlen": [2, 5],
}


def on(tensor):
    return tensor.to("npu")


def attended(dtype=torch.float64):
    q, k, v = (t.view(5, -1, 16).double() for t in (Q, K, V))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    out = []
    for first, last in ((0, 2), (2, 5)):
        one = (t[first:last].transpose(0, 1)[None] for t in (q, k, v))
        out.append(F.scaled_dot_product_attention(*one, is_causal=True, scale=0.25)[0].transpose(0, 1))
    return torch.cat(out)


def normed(x, w):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w


def experts(x, w, counts):
    return torch.cat([part @ w[i] for i, part in enumerate(x.split(counts))])


def out_of(function, *args, shape=(4, 8), **kwargs):
    target = torch.empty(shape, device="npu")
    function(*args, out=target, **kwargs)
    return target


def attention_out(function, **kwargs):
    out, lse = torch.empty(5, 4, 16, device="npu"), torch.empty(1, device="npu")
    function(on(Q).view(5, 4, 16), on(K).view(5, 2, 16), on(V).view(5, 2, 16), out=[out, lse], **kwargs)
    return out


def attention_of(function, **kwargs):
    return function(on(Q).view(5, 4, 16), on(K).view(5, 2, 16), on(V).view(5, 2, 16), **kwargs)[0]


D = torch.Tensor.double
E = torch.stack([W, W + 1])
# By spelling: the call on the NPU, and the right result on the CPU.
SPELLINGS = {
    "torch.mm": (lambda: torch.mm(on(X), on(W)), lambda: D(X) @ D(W)),
    "torch.mm(out=)": (lambda: out_of(torch.mm, on(X), on(W)), lambda: D(X) @ D(W)),
    "x @ w": (lambda: on(X) @ on(W), lambda: D(X) @ D(W)),
    "x @ w, three dimensions": (lambda: on(X)[None] @ on(W), lambda: (D(X) @ D(W))[None]),
    "x @ w, batches broadcast": (lambda: on(X)[None] @ on(E), lambda: D(X)[None] @ D(E)),
    "torch.matmul(out=)": (lambda: out_of(torch.matmul, on(X), on(W)), lambda: D(X) @ D(W)),
    "torch.mv": (lambda: torch.mv(on(X), on(B)), lambda: D(X) @ D(B)),
    "torch.dot": (lambda: torch.dot(on(B), on(B)), lambda: D(B) @ D(B)),
    "F.linear": (lambda: F.linear(on(X), on(W)), lambda: D(X) @ D(W).t()),
    "F.linear, three dimensions": (lambda: F.linear(on(X)[None], on(W)), lambda: (D(X) @ D(W).t())[None]),
    "F.linear with bias": (lambda: F.linear(on(X), on(W), on(B)), lambda: D(X) @ D(W).t() + D(B)),
    "nn.Linear": (
        lambda: torch.nn.Linear(8, 8).requires_grad_(False).to("npu")(on(X)).sum() * 0,
        lambda: torch.tensor(0.0),
    ),
    "torch_npu.npu_linear": (lambda: npu.npu_linear(on(X), on(W), on(B)), lambda: D(X) @ D(W).t() + D(B)),
    "torch.addmm": (lambda: torch.addmm(on(B), on(X), on(W), alpha=2), lambda: D(X) @ D(W) * 2 + D(B)),
    "torch.addmm(out=)": (lambda: out_of(torch.addmm, on(C), on(X), on(W)), lambda: D(X) @ D(W) + D(C)),
    "x.addmm_": (lambda: on(C).clone().addmm_(on(X), on(W)), lambda: D(X) @ D(W) + D(C)),
    "torch.bmm": (lambda: torch.bmm(on(E), on(E)), lambda: D(E) @ D(E)),
    "torch.bmm(out=)": (lambda: out_of(torch.bmm, on(E), on(E), shape=(2, 8, 8)), lambda: D(E) @ D(E)),
    "torch.baddbmm": (lambda: torch.baddbmm(on(E), on(E), on(E), beta=2), lambda: D(E) @ D(E) + 2 * D(E)),
    "torch.einsum": (lambda: torch.einsum("mk,kn->mn", on(X), on(W)), lambda: D(X) @ D(W)),
    "torch.addmv": (lambda: torch.addmv(on(C)[:, 0], on(X), on(B)), None),
    "torch.addbmm": (lambda: torch.addbmm(on(W), on(E), on(E)), None),
    "torch.sum(x, -1)": (lambda: torch.sum(on(X), -1), lambda: D(X).sum(-1)),
    "x.sum(dim=-1)": (lambda: on(X).sum(dim=-1), lambda: D(X).sum(-1)),
    "x.sum(dim=-1, keepdim=True)": (lambda: on(X).sum(-1, keepdim=True), lambda: D(X).sum(-1, keepdim=True)),
    "x.sum(0)": (lambda: on(X).sum(0), lambda: D(X).sum(0)),
    "x.sum()": (lambda: on(X).sum(), lambda: D(X).sum()),
    "torch.sum(out=)": (lambda: out_of(torch.sum, on(X), -1, shape=(4,)), lambda: D(X).sum(-1)),
    "x.mean(-1)": (lambda: on(X).mean(-1), lambda: D(X).mean(-1)),
    "torch.mean(x)": (lambda: torch.mean(on(X)), lambda: D(X).mean()),
    "torch.mean(out=)": (lambda: out_of(torch.mean, on(X), -1, shape=(4,)), lambda: D(X).mean(-1)),
    "x.softmax(-1)": (lambda: on(X).softmax(-1), lambda: D(X).softmax(-1)),
    "torch.softmax(x, 0)": (lambda: torch.softmax(on(X), 0), lambda: D(X).softmax(0)),
    "F.softmax(dtype=)": (lambda: F.softmax(on(X), -1, dtype=torch.float32), lambda: D(X).softmax(-1)),
    "aten._softmax": (lambda: torch.ops.aten._softmax(on(X), -1, False), lambda: D(X).softmax(-1)),
    "x.log_softmax(-1)": (lambda: on(X).log_softmax(-1), lambda: D(X).log_softmax(-1)),
    "aten._log_softmax": (lambda: torch.ops.aten._log_softmax(on(X), -1, False), lambda: D(X).log_softmax(-1)),
    "x.cumsum(-1)": (lambda: on(X).cumsum(-1), lambda: D(X).cumsum(-1)),
    "torch.cumsum(out=)": (lambda: out_of(torch.cumsum, on(X), 0), lambda: D(X).cumsum(0)),
    "x.topk(3)": (lambda: on(X).topk(3)[0], lambda: D(X).topk(3)[0]),
    "x.sort()": (lambda: on(X).sort()[0], lambda: D(X).sort()[0]),
    "x.norm()": (lambda: on(X).norm(), None),
    "x.var(-1)": (lambda: on(X).var(-1), None),
    "x.prod()": (lambda: on(X).prod(), None),
    "F.layer_norm": (lambda: F.layer_norm(on(X), (8,)), None),
    "F.scaled_dot_product_attention": (lambda: F.scaled_dot_product_attention(*(on(E)[None],) * 3), None),
    "torch_npu.npu_rms_norm": (lambda: npu.npu_rms_norm(on(X), on(B))[0], lambda: normed(D(X), D(B))),
    "torch.ops.npu.npu_rms_norm": (lambda: vendor.npu_rms_norm(on(X), on(B))[0], lambda: normed(D(X), D(B))),
    "torch_npu.npu_add_rms_norm": (
        lambda: npu.npu_add_rms_norm(on(X), on(C), on(B))[0],
        lambda: normed(D(X) + D(C), D(B)),
    ),
    "torch_npu.npu_gemma_rms_norm": (lambda: npu.npu_gemma_rms_norm(on(X), on(B))[0], lambda: normed(D(X), D(B) + 1)),
    "torch_npu.npu_swiglu": (lambda: npu.npu_swiglu(on(X)), lambda: F.silu(D(X)[:, :4]) * D(X)[:, 4:]),
    "torch_npu.npu_grouped_matmul": (
        lambda: npu.npu_grouped_matmul(
            [on(X)], [on(E)], group_list=on(torch.tensor([1, 4])), split_item=2, group_type=0, group_list_type=0
        )[0],
        lambda: experts(D(X), D(E), [1, 3]),
    ),
    "torch_npu.npu_moe_token_unpermute": (
        lambda: npu.npu_moe_token_unpermute(on(X), on(torch.tensor([3, 0, 1, 2])), on(C[:2, :2].contiguous())),
        lambda: (D(X)[[3, 0, 1, 2]].view(2, 2, 8) * D(C)[:2, :2, None]).sum(1),
    ),
    "torch_npu.npu_moe_gating_top_k_softmax": (lambda: npu.npu_moe_gating_top_k_softmax(on(X), k=2), None),
    "torch_npu.npu_moe_gating_top_k": (lambda: npu.npu_moe_gating_top_k(on(X), 2), None),
    "torch_npu.npu_dynamic_quant": (lambda: npu.npu_dynamic_quant(on(X)), None),
    "torch_npu.npu_top_k_top_p": (lambda: npu.npu_top_k_top_p(on(X)), None),
    "torch_npu attention": (
        lambda: attention_of(npu.npu_fused_infer_attention_score, **LENGTHS, **HEADS),
        lambda: attended(),
    ),
    "torch.ops.npu attention": (
        lambda: attention_of(vendor.npu_fused_infer_attention_score, **LENGTHS, **HEADS),
        lambda: attended(),
    ),
    "attention.out": (
        lambda: attention_out(npu.npu_fused_infer_attention_score.out, **LENGTHS, **HEADS),
        lambda: attended(),
    ),
    "attention v2": (lambda: attention_of(npu.npu_fused_infer_attention_score_v2, **HEADS_2), lambda: attended()),
    "attention v2.out": (
        lambda: attention_out(npu.npu_fused_infer_attention_score_v2.out, **HEADS_2),
        lambda: attended(),
    ),
    "attention, BSH layout": (
        lambda: npu.npu_fused_infer_attention_score(on(Q)[None], on(K)[None], on(V)[None], num_heads=4),
        None,
    ),
    "attention, heads of 512": (
        lambda: npu.npu_fused_infer_attention_score(
            *(torch.zeros(5, 2, 512, device="npu") for _ in "qkv"), **LENGTHS, **HEADS | {"num_heads": 2}
        ),
        None,
    ),
    "torch_npu.npu_fusion_attention": (lambda: npu.npu_fusion_attention(on(Q), on(K), on(V), 4, "TND"), None),
    "torch_npu.npu_incre_flash_attention": (lambda: npu.npu_incre_flash_attention(on(Q), on(K), on(V)), None),
    "torch_npu._npu_paged_attention": (
        lambda: npu._npu_paged_attention(
            query=on(Q),
            key_cache=on(K),
            value_cache=on(V),
            num_kv_heads=2,
            num_heads=4,
            scale_value=1.0,
            block_table=on(torch.zeros(1, 1).int()),
            context_lens=torch.ones(1).int(),
            out=on(Q),
        ),
        None,
    ),
    "torch_npu._npu_rotary_embedding": (
        lambda: npu._npu_rotary_embedding(on(torch.arange(5)), on(Q), on(K), 16, on(Q), True),
        None,
    ),
}


def outcome(run, right) -> tuple[str, str]:
    try:
        got = run()
    except UnsupportedFeature as error:
        return "refused", str(error)
    except Exception as error:  # the stub's native kernels raise many kinds of errors
        return "native", f"{type(error).__name__}: {str(error)[:160]}"
    if right is None:
        return "wrong", "computed, and was to be refused"
    want, got = right().double(), got.cpu().double()
    if want.shape != got.shape:
        return "wrong", f"shape {tuple(got.shape)}, not {tuple(want.shape)}"
    error = float((got - want).abs().max())
    return ("served", "") if error < 1e-5 else ("wrong", f"differs by {error:.1e}")


if __name__ == "__main__":
    stock = sys.argv[1:] == ["stock"]
    canonical.install()
    host_ops.install()
    if not stock:
        dispatch.install()
    counts = Counter()
    with torch.inference_mode() if "grad" not in sys.argv else torch.no_grad():
        for spelling, (run, right) in SPELLINGS.items():
            found, told = outcome(run, right)
            counts[found] += 1
            wanted = "served" if right is not None else "refused"
            print(json.dumps({"spelling": spelling, "found": found, "wanted": wanted, "told": told}), flush=True)
    if "batch_invariant_ops" in sys.modules:  # the double of the AscendC package
        print(json.dumps({"calls": sys.modules["batch_invariant_ops"].CALLS}), flush=True)
    print(counts, file=sys.stderr)
