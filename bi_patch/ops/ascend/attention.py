"""Attention on Ascend. AscendC serves a call that it covers where it is installed; else the bundled kernel serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bi_patch.ops.ascend import machine
from bi_patch.ops.ascend.forms import refuse

if TYPE_CHECKING:
    import torch

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
    """npu_fused_infer_attention_score for packed sequences (TND): query [T, heads, D] (floats) -> the same shape.

    key, value: [T, kv heads, D], or pages [blocks, block size, kv heads * D] with a block_table [sequences, blocks].
    The log-sum-exp is not computed: the second result is an empty fp32 tensor. Raises UnsupportedFeature for another
    layout, for masks other than none, causal and a causal band, and for any argument that is not named here.
    """
    import torch

    from bi_patch.kernels.ascend import attention

    op = "npu::npu_fused_infer_attention_score"
    used = sorted(name for name, given in more.items() if given is not None and given is not False and given != 0)
    if used:
        refuse(op, f"with {', '.join(used)}")
    if input_layout != "TND" or not actual_seq_lengths or not actual_seq_lengths_kv:
        refuse(op, f"layout {input_layout!r}; bi_patch serves layout TND with the lengths of queries and of keys")
    if sparse_mode not in (_CAUSAL, _BAND, _NONE) or (sparse_mode == _NONE and atten_mask is not None):
        refuse(op, f"sparse mode {sparse_mode} with the given mask")
    if sparse_mode == _BAND and next_tokens != 0:
        refuse(op, "a band in which a query sees later tokens")
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
    if block_table is None:  # without pages, the caller gives the end of each sequence's keys, as for queries
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
    """fused_attention with the argument names of npu_fused_infer_attention_score_v2; the same shapes and dtypes."""
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
