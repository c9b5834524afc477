"""Generated tokens of MLA whose latents are kept as 8-bit floats (e4m3, scales of 1), in BI_PATCH_MLA=two.

FlashAttention-MLA reads 16-bit latents only. vLLM's Triton-MLA kernel reads e4m3 and widens it to the queries' type.
One program computes one part of a row's keys for 16 heads: 32 keys after the other, in fp32. A row has always the same
number of parts, of equal length, so its own position alone decides where they begin. A second kernel adds the parts in
ascending order. Stock vLLM chooses the number by the longest sequence of the step; upstream's mode has one part.
"""

from bi_patch.seams.cuda.chunks import Metadata

# The functions of vLLM's triton_decode_attention that decide the order of a row's sums.
KERNELS = (
    "decode_attention_fwd",
    "decode_attention_fwd_normal",  # one head a rank
    "_decode_att_m_fwd",
    "_fwd_kernel_stage1",
    "decode_attention_fwd_grouped",
    "_decode_grouped_att_m_fwd",
    "_fwd_grouped_kernel_stage1",
    "_decode_softmax_reducev_fwd",
    "_fwd_kernel_stage2",
)
# One call keeps at most these bytes of partial results.
_PARTIAL = 1 << 30


def e4m3():
    """The type of the cached latents."""
    import torch

    return torch.float8_e4m3fn


def parts(heads: int) -> int:
    """Into how many parts each row is split. Few heads make few programs, so they have more parts."""
    return 16 if heads <= 32 else 8


def most_rows(heads: int, latent: int) -> int:
    """The most rows of one call."""
    return max(64, _PARTIAL // (parts(heads) * heads * (latent + 1) * 4))


class Rows:
    """As mla_rows.Rows: the metadata of generated rows. The kernel needs no schedule."""

    def make(self, block_table, seq_lens, longest: int):
        return Metadata(block_table=block_table, seq_lens=seq_lens)


def generate(layer, q, cache, metadata, out) -> None:
    """As mla_rows.generate. cache: e4m3 [pages, tokens, latent + rotary]."""
    from bi_patch.kernels.triton import heads as products

    rows, heads, _ = q.shape
    latent = layer.kv_lora_rank
    nope, rotary = q.split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], dim=-1)
    asked = q.new_empty((rows, heads, latent + layer.qk_rope_head_dim))
    products.product(nope.transpose(0, 1), layer.W_UK_T, asked[..., :latent].transpose(0, 1))
    asked[..., latent:] = rotary
    found, step = out.view(rows, heads, layer.v_head_dim), metadata.decode
    call = most_rows(heads, latent)
    for first in range(0, rows, call):
        at = slice(first, first + call)
        some = attend(layer, asked[at], cache, step.block_table[at], step.seq_lens[at])
        products.product(some.transpose(0, 1), layer.W_UV, found[at].transpose(0, 1))


def attend(layer, q, cache, block_table, seq_lens):
    """Attention of rows over the latents of their sequences: [rows, heads, latent].

    q: [rows, heads, latent + rotary]. block_table: int32 [rows, pages]. seq_lens: int32 [rows], latents of each row.
    """
    import torch
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    rows, heads, _ = q.shape
    latent, count = layer.kv_lora_rank, parts(heads)
    out, lse = q.new_empty((rows, heads, latent)), q.new_empty((rows, heads))
    held = cache.unsqueeze(2)  # one head
    decode_attention_fwd(
        q,
        held,
        held[..., :latent],
        out,
        lse,
        block_table,
        seq_lens.clamp(min=1),  # rows that pad a CUDA graph have no keys, whose mean would not be a number
        q.new_empty((rows, heads, count, latent + 1), dtype=torch.float32),
        count,
        layer.impl.scale,
        cache.shape[1],
        k_scale=layer._k_scale,
        v_scale=layer._k_scale,
        is_mla=True,
    )
    return out
