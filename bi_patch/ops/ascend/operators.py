"""PyTorch's and torch_npu's operators on Ascend, computed in one order: what the dispatcher calls, not native kernels.

Each function has the signature of the operator that it serves (named in ascend_routes) and takes tensors on the NPU. An
argument that the order does not cover is UnsupportedFeature, named; none is passed on to a native kernel. Floats below
are bf16, fp16 or fp32; results have the dtype of the first tensor unless a docstring says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops.ascend import machine

if TYPE_CHECKING:
    import torch


def refuse(op: str, why: str):
    """Raise UnsupportedFeature, naming the operator and what the order does not cover."""
    raise UnsupportedFeature(f"{op}: {why}. No order is fixed for it on Ascend; set BI_PATCH=0 to run without bi_patch")


def out_form(function: Callable, results: int = 1) -> Callable:
    """The `.out` overload of a function: the same values, copied into `out` (a tensor, or `results` tensors)."""

    def into(*args, out, **kwargs):
        made = function(*args, **kwargs)
        if results == 1:
            return out.copy_(made)
        for target, value in zip(out, made, strict=True):
            if value.numel():
                target.copy_(value.view(target.shape))
        return tuple(out)

    return into


def named_out_form(function: Callable, names: tuple[str, ...]) -> Callable:
    """The same for an overload whose results are keyword arguments of these names."""

    def into(*args, **kwargs):
        targets = [kwargs.pop(name) for name in names]
        made = function(*args, **kwargs)
        for target, value in zip(targets, made, strict=True):
            if value.numel():
                target.copy_(value.view(target.shape))
        return tuple(targets)

    return into


def in_place(function: Callable) -> Callable:
    """The overload that writes into its first argument."""

    def into(self, *args, **kwargs):
        return self.copy_(function(self, *args, **kwargs))

    return into


# Products


def _product(x, w, bias=None, alpha=1.0, beta=1.0):
    """x [B, M, K] @ w [B, K, N] (+ bias), by AscendC where it is installed and by the bundled kernel otherwise."""
    from bi_patch.kernels.ascend import matmul

    if x.dtype != w.dtype:
        raise RuntimeError(f"expected one dtype of both operands, found {x.dtype} and {w.dtype}")
    vendor = machine.ascendc()
    if not vendor or not x.dtype.is_floating_point:
        if not x.dtype.is_floating_point:
            refuse("aten::matmul", f"{x.dtype} operands")
        return matmul.matmul(x, w, machine.chip(), bias, alpha, beta)
    if x.shape[0] == 1:
        out = vendor["npu_mm_batch_invariant"](x[0], w[0])[None]
    else:
        out = vendor["npu_matmul_batch_invariant"](x, w)
    if alpha != 1:
        out = out * alpha
    if bias is not None and beta != 0:
        out = out + (bias if beta == 1 else bias * beta)
    return out


def mm(self, mat2):
    """self [M, K] @ mat2 [K, N] -> [M, N]; floats of one dtype."""
    return _product(self[None], mat2[None])[0]


def addmm(self, mat1, mat2, *, beta=1, alpha=1):
    """beta * self + alpha * (mat1 [M, K] @ mat2 [K, N]) -> [M, N]; floats, self broadcasts to the result."""
    return _product(mat1[None], mat2[None], self, alpha, beta)[0]


def bmm(self, mat2):
    """self [B, M, K] @ mat2 [B, K, N] -> [B, M, N]; floats of one dtype."""
    return _product(self, mat2)


def baddbmm(self, batch1, batch2, *, beta=1, alpha=1):
    """beta * self + alpha * (batch1 [B, M, K] @ batch2 [B, K, N]) -> [B, M, N]; floats, self broadcasts."""
    return _product(batch1, batch2, self, alpha, beta)


def mv(self, vec):
    """self [M, K] @ vec [K] -> [M]; floats of one dtype."""
    return _product(self[None], vec[None, :, None])[0, :, 0]


def dot(self, tensor):
    """self [K] @ tensor [K] -> a scalar tensor; floats of one dtype."""
    return _product(self[None, None], tensor[None, :, None])[0, 0, 0]


def linear(input, weight, bias=None):
    """input [..., K] @ weight [N, K] transposed (+ bias [N]) -> [..., N]; floats of one dtype."""
    rows = input.reshape(-1, input.shape[-1])
    return _product(rows[None], weight.t()[None], bias)[0].view(*input.shape[:-1], weight.shape[0])


def matmul(self, other):
    """self [..., M, K] @ other [..., K, N] -> [..., M, N], broadcast as PyTorch does; floats of one dtype."""
    if self.dim() == 1 and other.dim() == 1:
        return dot(self, other)
    if other.dim() <= 2:
        w = other if other.dim() == 2 else other[:, None]
        x = self if self.dim() > 1 else self[None]
        out = _product(x.reshape(1, -1, x.shape[-1]), w[None])[0].view(*x.shape[:-1], w.shape[1])
        out = out if other.dim() == 2 else out[..., 0]
        return out if self.dim() > 1 else out[0]
    import torch

    x = self if self.dim() > 1 else self[None]
    batch = torch.broadcast_shapes(x.shape[:-2], other.shape[:-2])
    x_all, w_all = x.expand(*batch, *x.shape[-2:]), other.expand(*batch, *other.shape[-2:])
    count = math.prod(batch)
    out = _product(
        x_all.reshape(count, *x.shape[-2:]).contiguous(), w_all.reshape(count, *other.shape[-2:]).contiguous()
    )
    out = out.view(*batch, x.shape[-2], other.shape[-1])
    return out if self.dim() > 1 else out[..., 0, :]


def npu_linear(input, weight, bias=None):
    """input [..., K] @ weight [N, K] transposed (+ bias [N]) -> [..., N]; floats of one dtype."""
    return linear(input, weight, bias)


# Reductions


def _last(x, dims: Sequence[int]):
    """x with `dims` moved to the end and made one; and the shape that is left."""
    kept = [d for d in range(x.dim()) if d not in dims]
    moved = x.permute(*kept, *dims).contiguous()
    return moved.view(*(x.shape[d] for d in kept), -1), kept


def _reduce(x, dim, keepdim: bool, dtype, mean: bool):
    from bi_patch.kernels.ascend import rows

    dims = range(x.dim()) if dim is None or (isinstance(dim, (list, tuple)) and not dim) else dim
    dims = sorted({d % max(1, x.dim()) for d in ([dims] if isinstance(dims, int) else dims)})
    if dtype is not None and dtype.is_floating_point and dtype.itemsize < x.dtype.itemsize:
        refuse("aten::sum", f"a sum of {x.dtype} into {dtype}")
    if not x.dtype.is_floating_point or x.dtype.itemsize > 4:
        refuse("aten::sum", f"a sum of {x.dtype} into {dtype}")
    if x.dim() == 0:
        return x.to(dtype or x.dtype)
    count = math.prod(x.shape[d] for d in dims)
    flat, kept = _last(x, dims)
    if count == 0:
        out = flat.new_full(flat.shape[:-1], float("nan") if mean else 0.0, dtype=dtype or x.dtype)
    elif "npu_reduce_sum_batch_invariant" in machine.ascendc() and not mean and dtype in (None, x.dtype):
        out = machine.ascendc()["npu_reduce_sum_batch_invariant"](flat, -1, False)
    else:
        out = rows.total(flat, machine.chip(), dtype, mean)
    if keepdim:
        out = out.view(*(1 if d in dims else x.shape[d] for d in range(x.dim())))
    return out


def sum_all(self, *, dtype=None):
    """The sum of all of self (floats) -> a scalar tensor of dtype, by default self's."""
    return _reduce(self, None, False, dtype, False)


def sum_dim(self, dim, keepdim=False, *, dtype=None):
    """The sum of self [...] (floats) over dimensions `dim` (all when empty), of dtype, by default self's."""
    return _reduce(self, dim, keepdim, dtype, False)


def mean_all(self, *, dtype=None):
    """The mean of all of self (floats) -> a scalar tensor of dtype, by default self's."""
    return _reduce(self, None, False, dtype, True)


def mean_dim(self, dim, keepdim=False, *, dtype=None):
    """The mean of self [...] (floats) over dimensions `dim` (all when empty), of dtype, by default self's."""
    return _reduce(self, dim, keepdim, dtype, True)


def _along(x, dim: int, run: Callable):
    """run over the last dimension, of x with `dim` moved there."""
    if x.dim() == 0:
        return run(x[None])[0]
    if dim % x.dim() == x.dim() - 1:
        return run(x)
    return run(x.transpose(dim, -1).contiguous()).transpose(dim, -1).contiguous()


def _soft(self, dim, dtype, log):
    from bi_patch.kernels.ascend import rows

    if not self.dtype.is_floating_point or self.dtype.itemsize > 4:
        refuse("aten::_softmax", f"softmax of {self.dtype}")
    return _along(self, dim, lambda x: rows.softmax(x, machine.chip(), dtype, log))


def softmax_half(self, dim, half_to_float):
    """softmax of self [...] (floats) along dim, the same shape; fp32 where half_to_float."""
    import torch

    return _soft(self, dim, torch.float32 if half_to_float else None, False)


def log_softmax_half(self, dim, half_to_float):
    """log_softmax of self [...] (floats) along dim, the same shape; fp32 where half_to_float."""
    import torch

    return _soft(self, dim, torch.float32 if half_to_float else None, True)


def softmax_int(self, dim, dtype=None):
    """softmax of self [...] (floats) along dim, the same shape, of dtype, by default self's."""
    return _soft(self, dim, dtype, False)


def log_softmax_int(self, dim, dtype=None):
    """log_softmax of self [...] (floats) along dim, the same shape, of dtype, by default self's."""
    return _soft(self, dim, dtype, True)


def cumsum(self, dim, *, dtype=None):
    """The running sum of self [...] (floats) along dim, the same shape, of dtype, by default self's."""
    from bi_patch.kernels.ascend import rows

    if not self.dtype.is_floating_point or self.dtype.itemsize > 4:
        refuse("aten::cumsum", f"a running sum of {self.dtype} into {dtype}")
    return _along(self, dim, lambda x: rows.cumsum(x, machine.chip(), dtype))


def topk(self, k, dim=-1, largest=True, sorted=True):
    """The k best of self [...] along dim, and int64 indices; ties go to the lower index, by a stable sort."""
    import torch

    values, indices = torch.ops.aten.sort.stable(self, stable=True, dim=dim, descending=largest)
    return values.narrow(dim, 0, k).contiguous(), indices.narrow(dim, 0, k).contiguous()


def sort(self, dim=-1, descending=False):
    """self [...] of any dtype sorted along dim, and int64 indices, both of its shape; ties keep their order."""
    import torch

    return torch.ops.aten.sort.stable(self, stable=True, dim=dim, descending=descending)


# Norms and activations


def rms_norm(x, weight, eps: float, residual=None, offset: float = 0.0):
    """RMSNorm of x [..., C] times (weight + offset); with a residual, (norm of x + residual, x + residual)."""
    from bi_patch.kernels.ascend import rows

    out, summed = rows.rms_norm(x, weight, eps, machine.chip(), residual, offset)
    return out if residual is None else (out, summed)


def npu_rms_norm(input, gamma, epsilon=1e-6):
    """RMSNorm of input [..., C] (floats) times gamma [C]; an empty fp32 tensor stands for the reciprocal root."""
    import torch

    return rms_norm(input, gamma, epsilon), torch.empty(0, dtype=torch.float32, device=input.device)


def npu_gemma_rms_norm(input, gamma, epsilon=1e-6):
    """RMSNorm of input [..., C] (floats) times (gamma [C] + 1), and an empty fp32 tensor."""
    import torch

    out = rms_norm(input, gamma, epsilon, None, 1.0)
    return out, torch.empty(0, dtype=torch.float32, device=input.device)


def npu_add_rms_norm(x1, x2, gamma, epsilon=1e-6):
    """RMSNorm of x1 + x2 [..., C] (floats) times gamma [C], an empty fp32 tensor, and x1 + x2 [..., C]."""
    import torch

    out, summed = rms_norm(x1, gamma, epsilon, x2)
    return out, torch.empty(0, dtype=torch.float32, device=x1.device), summed


def npu_swiglu(input, dim=-1):
    """silu(first half) * second half of input [..., 2 H, ...] (floats) along dim -> [..., H, ...]."""
    from bi_patch.kernels.ascend import pointwise

    return _along(input, dim, lambda x: pointwise.swiglu(x, machine.chip()))


def rotate(positions, query, key, cache, head_size: int):
    """Rotary embedding, neox style, of query [T, Hq * head_size] and key (or None) by cache [P, rotary]."""
    from bi_patch.kernels.ascend import pointwise

    turned = [pointwise.rotate(positions, x, cache, head_size, machine.chip()) for x in (query, key) if x is not None]
    return turned[0], turned[1] if key is not None else None


# Experts


def npu_grouped_matmul(
    x, weight, *, bias=None, group_list=None, split_item=0, group_type=None, group_list_type=0, **more
):
    """x[0] [T, K] @ weight[0] [E, K, N], each row by its expert -> [[T, N]]; floats; group_list [E] integers."""
    from bi_patch.kernels.ascend import matmul

    op = "npu::npu_grouped_matmul"
    used = sorted(name for name, value in more.items() if value not in (None, 0, [], ()))
    if used:
        refuse(op, f"with {', '.join(used)}")
    plain = len(x) == 1 and len(weight) == 1 and weight[0].dim() == 3 and split_item in (2, 3) and group_type == 0
    if not plain or group_list is None or isinstance(group_list, (list, tuple)) or group_list_type not in (0, 1):
        refuse(op, "other than one tensor of rows, one of experts, and a tensor of groups along the rows")
    held = bias[0] if bias else None
    return [matmul.grouped(x[0], weight[0], group_list, group_list_type == 1, machine.chip(), held)]


def npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None):
    """permuted_tokens [T * k, C] (floats) back in order by indices [T * k], weighted by probs [T, k] -> [T, C]."""
    from bi_patch.kernels.ascend import rows

    if padded_mode or restore_shape not in (None, [], ()) and probs is None:
        refuse("npu::npu_moe_token_unpermute", "padded mode")
    top_k = 1 if probs is None else probs.shape[1]
    return rows.weighted(permuted_tokens, sorted_indices.abs(), probs, top_k, machine.chip())


# Attention

_CAUSAL, _BAND, _NONE = 3, 4, 0


def fused_attention(
    query,
    key,
    value,
    *,
    atten_mask=None,
    actual_seq_lengths=None,
    actual_seq_lengths_kv=None,
    block_table=None,
    num_heads=1,
    num_key_value_heads=0,
    scale=1.0,
    input_layout="BSH",
    sparse_mode=0,
    block_size=0,
    pre_tokens=2**31 - 1,
    next_tokens=2**31 - 1,
    learnable_sink=None,
    workspace=None,
    inner_precise=0,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_fused_infer_attention_score for packed sequences (TND), query [T, heads, D] of floats -> the same shape.

    key, value: [T, kv heads, D], or pages [blocks, block size, kv heads * D] with a block_table [sequences, blocks].
    The log-sum-exp is not returned: an empty fp32 tensor stands for it.
    """
    import torch

    from bi_patch.kernels.ascend import attention

    op = "npu::npu_fused_infer_attention_score"
    used = sorted(name for name, given in more.items() if given is not None and given is not False and given != 0)
    if used:
        refuse(op, f"with {', '.join(used)}")
    if input_layout != "TND" or not actual_seq_lengths or not actual_seq_lengths_kv:
        refuse(op, f"layout {input_layout!r}, or without lengths: only TND with both lists of lengths")
    if sparse_mode not in (_CAUSAL, _BAND, _NONE) or (sparse_mode == _NONE and atten_mask is not None):
        refuse(op, f"sparse mode {sparse_mode} with this mask")
    if sparse_mode == _BAND and next_tokens != 0:
        refuse(op, "a band that looks ahead")
    if machine.ascendc() and sparse_mode == _CAUSAL and learnable_sink is None:
        serve = machine.ascendc()["npu_fused_infer_attention_score_batch_invariant"]
        return serve(
            query,
            key,
            value,
            atten_mask=atten_mask,
            block_table=block_table,
            input_layout=input_layout,
            block_size=block_size,
            actual_seq_lengths=actual_seq_lengths,
            actual_seq_lengths_kv=actual_seq_lengths_kv,
            num_key_value_heads=num_key_value_heads,
            num_heads=num_heads,
            scale=scale,
            sparse_mode=sparse_mode,
        )
    kv_heads = num_key_value_heads or num_heads
    ends, lengths = ([int(n) for n in held] for held in (actual_seq_lengths, actual_seq_lengths_kv))
    if block_table is None:  # lengths of keys come as ends, like those of queries
        lengths = [end - start for start, end in zip([0, *lengths], lengths, strict=False)]
    key, value = (t.view(*t.shape[: 2 if block_table is not None else 1], kv_heads, -1) for t in (key, value))
    try:
        out = attention.attention(
            query.view(query.shape[0], num_heads, -1),
            key,
            value,
            ends,
            lengths[: len(ends)],
            scale,
            machine.chip(),
            block_table=block_table,
            causal=sparse_mode != _NONE,
            window=int(pre_tokens) if sparse_mode == _BAND else None,
            sinks=learnable_sink,
        )
    except ValueError as error:
        refuse(op, str(error))
    return out, torch.empty(0, dtype=torch.float32, device=query.device)


def fused_attention_v2(
    query,
    key,
    value,
    *,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    num_query_heads=1,
    softmax_scale=1.0,
    **more,
):
    """fused_attention under the names of npu_fused_infer_attention_score_v2: the same shapes and dtypes."""
    return fused_attention(
        query,
        key,
        value,
        actual_seq_lengths=_list(actual_seq_qlen),
        actual_seq_lengths_kv=_list(actual_seq_kvlen),
        num_heads=num_query_heads,
        scale=softmax_scale,
        **more,
    )


def _list(lengths):
    return lengths.tolist() if hasattr(lengths, "tolist") else lengths
