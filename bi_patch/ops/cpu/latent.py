"""MLA on CPU in its absorbed form, by bundled kernels: one order for prompts, chunks and generated tokens.

A head's query is multiplied into the latent's space (absorbed), attends to the latents themselves, and its output is
multiplied back into the head's space. Both products are the bundled GEMM, head by head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class Absorbed:
    """The up-projections of one layer, packed by head for the bundled GEMM: `key` [latent, nope], `value` [V, latent].

    key, value: [heads, packed size]. nope, latent, size: elements of a head's unrotated query, of a latent without its
    rotated part, and of a head's output V.
    """

    key: torch.Tensor
    value: torch.Tensor
    nope: int
    latent: int
    size: int

    def take(self, other: Absorbed) -> None:
        """Take the weights of another one of the same sizes, in place."""
        self.key.copy_(other.key)
        self.value.copy_(other.value)


def absorb(weight: torch.Tensor, heads: int, nope: int, size: int) -> Absorbed:
    """Pack the up-projection of keys and values, weight [heads * (nope + size), latent], as a checkpoint has it."""
    import torch

    latent = weight.shape[1]
    held = weight.detach().view(heads, nope + size, latent)
    key = torch.stack([torch.ops.bi_cpu.gemm_pack(w.T.contiguous()) for w in held[:, :nope]])
    value = torch.stack([torch.ops.bi_cpu.gemm_pack(w) for w in held[:, nope:]])
    return Absorbed(key, value, nope, latent, size)


def attention(
    out: torch.Tensor,
    query: torch.Tensor,
    absorbed: Absorbed,
    cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
) -> None:
    """Write causal attention over the paged latents into `out` [tokens, heads * size].

    query: [tokens, heads, nope + rotated]. cache: [blocks, block size, latent + rotated], which holds the tokens' own
    latents already. query_start_loc: [sequences + 1] int32. seq_lens: [sequences] int32. block_table: [sequences,
    blocks] int32.
    """
    import torch

    tokens, heads, _ = query.shape
    asked = query.new_empty((tokens, heads, cache.shape[-1]))
    torch.ops.bi_cpu.heads_gemm(asked[..., : absorbed.latent], query[..., : absorbed.nope], absorbed.key)
    asked[..., absorbed.latent :] = query[..., absorbed.nope :]
    found = query.new_empty((tokens, heads, absorbed.latent))
    torch.ops.bi_cpu.latent_attention(found, asked, cache, query_start_loc, seq_lens, block_table, scale)
    torch.ops.bi_cpu.heads_gemm(out.view(tokens, heads, absorbed.size), found, absorbed.value)
