"""Generated tokens of MLA in a form of their own: each token is a sequence of one row, whose keys are split by the
token's own position.

FlashAttention 3 splits the keys of a sequence into equal parts of whole blocks of 64 keys, and adds the parts in
ascending order in fp32. Its schedule holds the number of parts of each sequence. FlashAttention computes that number
from the batch; here the position alone decides it. So does a token's row in a replay after a preemption, where a
sequence has many rows: each of them is a sequence of its own.
"""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cuda.chunks import Metadata

BLOCK = 64  # keys of one block of FlashAttention-MLA
MOST = 32  # parts of one sequence
# FlashAttention splits no more sequences than this in one call.
_LONGEST_CALL = 992
# One call keeps at most these bytes of partial results.
_PARTIAL = 1 << 30


def parts(keys: int, heads: int) -> int:
    """Into how many parts a row with `keys` keys is split: a function of the row's own position, and of the layer.

    Chosen by measurement on an H200 (benchmarks/hopper/mla.py). More parts serve few requests faster, and cost time
    with many. With many heads, the partial results of a part are larger.
    """
    blocks = -(-keys // BLOCK)
    if heads > 32:
        wanted = -(-blocks // 16)
    elif blocks <= 30:
        wanted = -(-blocks // 6)
    else:
        wanted = 5 + -(-(blocks - 30) // 13)
    return max(1, min(MOST, wanted))


def most_rows(heads: int, latent: int) -> int:
    """The most rows of one call."""
    return max(64, min(_LONGEST_CALL, _PARTIAL // (MOST * heads * latent * 4)))


@functools.lru_cache(maxsize=4)
def table(longest: int, heads: int, device):
    """parts(keys, heads) for 0 to `longest` keys, int32 [longest + 1]."""
    import torch

    return torch.tensor([parts(keys, heads) for keys in range(longest + 1)], dtype=torch.int32, device=device)


class Rows:
    """Makes the metadata of generated rows for one kind of layer.

    heads, latent, rotary: of the layer on this rank. page: tokens of a KV page. longest: the longest sequence.
    rows: the most rows of one step, whose schedules stay where they are, since CUDA graphs read them. None: no graphs.
    """

    def __init__(self, heads, latent, rotary, page, dtype, device, longest, rows=None):
        import torch

        self.heads, self.latent, self.rotary, self.page, self.dtype = heads, latent, rotary, page, dtype
        self.device, self.longest = device, longest
        self.call = most_rows(heads, latent)
        self.starts = torch.arange(self.call + 1, dtype=torch.int32, device=device)
        self.parts = table(longest, heads, device)
        self.kept = None
        if rows is not None:
            wide = -(-self.call // 4) * 16 + 4  # each schedule begins at an address that FlashAttention can load
            self.kept = torch.zeros((-(-rows // self.call), wide), dtype=torch.int32, device=device)

    def make(self, block_table, seq_lens, longest: int):
        """The metadata of rows with int32 seq_lens [rows] keys each. block_table: int32 [rows, pages]. longest: the
        most keys of a row, or more. The metadata of further calls are in `.more`."""
        made = []
        for number, first in enumerate(range(0, len(seq_lens), self.call)):
            at = slice(first, first + self.call)
            made.append(self._one(number, block_table[at], seq_lens[at], longest))
        made[0].more = made[1:]
        return made[0]

    def _one(self, number: int, block_table, seq_lens, longest: int):
        count = len(seq_lens)
        schedule = self.schedule(seq_lens, longest)
        if self.kept is not None and number < len(self.kept):
            kept = self.kept[number, : len(schedule)]
            kept.copy_(schedule)
            schedule = kept
        return Metadata(
            block_table=block_table,
            seq_lens=seq_lens,
            query_start_loc=self.starts[: count + 1],
            max_query_len=1,
            max_seq_len=longest,
            scheduler_metadata=schedule,
            max_num_splits=MOST,
        )

    def theirs(self, seq_lens, longest: int):
        """FlashAttention's schedule, whose numbers of parts depend on the batch."""
        from vllm.v1.attention.backends import fa_utils

        return fa_utils.get_scheduler_metadata(
            batch_size=len(seq_lens),
            max_seqlen_q=1,
            max_seqlen_k=longest,
            num_heads_q=self.heads,
            num_heads_kv=1,
            headdim=self.rotary,
            cache_seqlens=seq_lens,
            qkv_dtype=self.dtype,
            headdim_v=self.latent,
            page_size=self.page,
            cu_seqlens_q=self.starts[: len(seq_lens) + 1],
            causal=True,
            num_splits=MOST,
        )

    def schedule(self, seq_lens, longest: int):
        """FlashAttention's schedule with the numbers of parts of `parts`."""
        import torch

        count = len(seq_lens)
        made = self.theirs(seq_lens, longest)
        wide = -(-count // 4) * 4
        vectors, rest = divmod(len(made) - 1, wide)
        if rest or vectors not in (2, 3):
            raise UnsupportedFeature(
                f"mla.cuda_rows: a schedule of {len(made)} numbers for {count} sequences, which is not known. "
                "Set BI_PATCH_MLA=one"
            )
        chosen = made[wide : wide + count]
        if vectors == 2:
            torch.index_select(self.parts, 0, seq_lens, out=chosen)
        else:  # the sequences are sorted: the third vector says which is where
            order = made[2 * wide : 2 * wide + count]
            torch.index_select(self.parts, 0, seq_lens[order.long()], out=chosen)
        return made

    def check(self) -> None:
        """Raises UnsupportedFeature unless FlashAttention's schedule holds the numbers of parts where `make` writes
        them: for few sequences, FlashAttention gives each block a part."""
        import torch

        lengths = torch.tensor([BLOCK, 10 * BLOCK, 3 * BLOCK - 5], dtype=torch.int32, device=self.device)
        made = self.theirs(lengths, 10 * BLOCK).tolist()
        order = made[8:11] if len(made) == 13 else [0, 1, 2]
        if len(made) not in (9, 13) or [made[4 + order.index(i)] for i in range(3)] != [1, 10, 3]:
            raise UnsupportedFeature(
                f"mla.cuda_rows: FlashAttention's schedule has another layout than bi_patch knows: {made}. "
                "Set BI_PATCH_MLA=one"
            )


def generate(layer, q, cache, metadata, out) -> None:
    """Write generated rows to out [rows, heads * D]. q: [rows, heads, nope + rotary]. layer: a MLAAttention.

    metadata: what `Rows.make` made, as `.decode`.
    """
    from bi_patch.kernels.triton import heads as products

    rows, heads, _ = q.shape
    nope, rotary = q.split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], dim=-1)
    low = q.new_empty((rows, heads, layer.kv_lora_rank))
    products.product(nope.transpose(0, 1), layer.W_UK_T, low.transpose(0, 1))
    found, first = out.view(rows, heads, layer.v_head_dim), 0
    for step in (metadata.decode, *metadata.decode.more):
        at = slice(first, first + len(step.seq_lens))
        some, _ = layer.impl.forward_mqa((low[at], rotary[at]), cache, Metadata(decode=step), layer)
        products.product(some.transpose(0, 1), layer.W_UV, found[at].transpose(0, 1))
        first = at.stop
