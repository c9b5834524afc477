"""Experts on Ascend: their grouped product, and the sum of a token's rows over its experts."""

from __future__ import annotations

from bi_patch.ops.ascend import machine
from bi_patch.ops.ascend.forms import refuse


def npu_grouped_matmul(
    x, weight, *, bias=None, group_list=None, split_item=0, group_type=None, group_list_type=0, **more
):
    """Each row of x[0] [T, K] @ the matrix of its expert in weight[0] [E, K, N] -> a list of one tensor [T, N].

    x, weight: lists of one tensor of floats. group_list: [E] integers that say which rows belong to which expert, as
    ends of groups (group_list_type 0) or as lengths (1). Raises UnsupportedFeature for any other form of the call.
    """
    from bi_patch.kernels.ascend import matmul

    op = "npu::npu_grouped_matmul"
    used = sorted(name for name, value in more.items() if value not in (None, 0, [], ()))
    if used:
        refuse(op, f"with {', '.join(used)}")
    plain = len(x) == 1 and len(weight) == 1 and weight[0].dim() == 3 and split_item in (2, 3) and group_type == 0
    if not plain or group_list is None or isinstance(group_list, (list, tuple)) or group_list_type not in (0, 1):
        refuse(op, "not one tensor of rows, one of experts, and a tensor of groups along the rows")
    held = bias[0] if bias else None
    return [matmul.grouped(x[0], weight[0], group_list, group_list_type == 1, machine.chip(), held)]


def npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None):
    """Put rows back in token order and sum each token's k rows, weighted by probs.

    permuted_tokens: [T * k, C] floats. sorted_indices: [T * k] integers. probs: [T, k], or None for k = 1 and weight 1.
    Returns [T, C]. Raises UnsupportedFeature for padded mode.
    """
    from bi_patch.kernels.ascend import rows

    if padded_mode or restore_shape not in (None, [], ()) and probs is None:
        refuse("npu::npu_moe_token_unpermute", "padded mode")
    top_k = 1 if probs is None else probs.shape[1]
    return rows.weighted(permuted_tokens, sorted_indices.abs(), probs, top_k, machine.chip())
