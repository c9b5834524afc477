"""Attention on CPU: the bundled kernel replaces the stock kernel. It splits KV by position, not by the batch."""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Seam, Target

_MODULE = "vllm.v1.attention.backends.cpu_attn"
_TYPES = ("decoder", "encoder_only")  # encoder_only: over the whole prompt in both directions, without a cache


def _init(original):
    """CPUAttentionBackendImpl.__init__: refuse every option that the bundled kernel does not compute."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        refused = {
            "ALiBi slopes": self.alibi_slopes is not None,
            "attention sinks": self.sinks is not None,
            f"a {self.kv_cache_dtype} KV cache": self.is_fp8_kv_cache,
            f"{self.attn_type} attention": self.attn_type not in _TYPES,
        }
        found = [name for name, present in refused.items() if present]
        if found:
            raise UnsupportedFeature(
                f"attention.cpu: the bundled CPU attention does not cover {', '.join(found)}. Set BI_PATCH=0"
            )

    return __init__


def _build(original):
    """CPUAttentionMetadataBuilder.build: describe the batch without the split of work that stock vLLM computes."""

    @functools.wraps(original)
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

        from bi_patch.ops.cpu import attention

        common = common_attn_metadata
        if self.is_encoder_only_attention and common.causal is False:
            cache, table, slots = attention.scratch(
                common.query_start_loc, common.seq_lens, self.num_kv_heads, self.block_size, self.head_dim, self.dtype
            )
        elif common.causal is True and not self.is_encoder_only_attention:
            cache, table, slots = None, common.block_table_tensor, common.slot_mapping
        else:
            raise UnsupportedFeature(
                "attention.cpu: on CPU, bi_patch covers causal attention of decoders and attention of encoders "
                "without a cache. Set BI_PATCH=0"
            )
        return CPUAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=table,
            slot_mapping=slots,
            scheduler_metadata=None,
            causal=common.causal,
            encoder_cache=cache,
        )

    return build


def _forward(original):
    """CPUAttentionBackendImpl.forward: call the bundled kernel, which keeps one order for every split of the work."""
    from bi_patch.ops.cpu import attention

    @functools.wraps(original)
    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        if attn_metadata is None:  # warm-up
            return output
        tokens = attn_metadata.num_actual_tokens
        if self.attn_type == "encoder_only":
            kv_cache = attn_metadata.encoder_cache
            attention.kv_store(key[:tokens], value[:tokens], kv_cache, attn_metadata.slot_mapping)
        attention.attention(
            output[:tokens],
            query[:tokens],
            kv_cache,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            self.scale,
            self.sliding_window - 1 if self.sliding_window > 0 else -1,  # vLLM's window counts the token itself
            self.logits_soft_cap,
            attn_metadata.causal,
        )
        return output

    return forward


def _store(original):
    """CPUAttentionBackendImpl.do_kv_cache_update: store keys and values in the bundled kernel's layout."""
    from bi_patch.ops.cpu import attention

    @functools.wraps(original)
    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        if self.attn_type == "encoder_only":  # it has no cache; `forward` stores the step's keys and values
            return
        attention.kv_store(key, value, kv_cache, slot_mapping)

    return do_kv_cache_update


def _seam(name: str, qualname: str, close, how: str, serves: tuple[str, ...] = ()) -> Seam:
    return Seam(
        name=f"attention.cpu_{name}",
        targets=(Target(_MODULE, qualname),),
        close=close,
        why="the stock kernel splits KV among threads by the total length of the batch, and the query tile decides the "
        "KV tile",
        how=how,
        until="upstream's CPU attention splits KV by position",
        causes=(3, 4, 6, 7, 9),
        serves=serves,
    )


SEAMS = (
    _seam(
        "init",
        "CPUAttentionBackendImpl.__init__",
        _init,
        "bi_patch refuses by name what the bundled kernel does not cover",
    ),
    _seam("build", "CPUAttentionMetadataBuilder.build", _build, "vLLM computes no split of the work from the batch"),
    _seam(
        "forward",
        "CPUAttentionBackendImpl.forward",
        _forward,
        "the bundled kernel splits KV into parts of fixed length at fixed positions and merges them in ascending order",
        ("Attention",),
    ),
    _seam(
        "store",
        "CPUAttentionBackendImpl.do_kv_cache_update",
        _store,
        "keys and values go into the cache in the bundled kernel's layout",
    ),
)
