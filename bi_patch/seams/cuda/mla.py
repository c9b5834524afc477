"""MLA (multi-head latent attention) on Hopper: FlashAttention-MLA in the absorbed form for every token.

Upstream's mode computes up to 512 new tokens of a request in the absorbed form, and more in the other form, whose bits
differ. So the chunk budget and the prefix cache decide the form. Here every token takes the absorbed form, in one
split.
"""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cuda.chunks import Metadata
from bi_patch.seams.model import Seam, Target

_LAYER = "vllm.model_executor.layers.attention.mla_attention"
_FLASH = "vllm.v1.attention.backends.mla.flashattn_mla"
_BACKEND = "FLASH_ATTN_MLA"
_RELEASES = ">=0.33"
_ALL = 1 << 30  # a number of new tokens that no request has
# FlashAttention 3 has another tile for short queries, as in attention.py. It never takes it for 128 tokens or more.
_LONG_QUERY = 128


def _init(original):
    """MLAAttention.__init__: refuse every backend and option without a certificate."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        refused = {
            f"the {self.attn_backend.get_name()} backend": self.attn_backend.get_name() != _BACKEND,
            "sparse attention": self.use_sparse or self.indexer is not None,
            "a sliding window": self.sliding_window is not None,
            "attention to later tokens": self.non_causal_multi_token_decode,
            f"a {self.kv_cache_dtype} KV cache": self.kv_cache_dtype not in ("auto", "bfloat16", "float16"),
            "context parallelism": self.use_pcp or self.impl.dcp_world_size > 1 or self.dcp_q_replicate,
        }
        found = [name for name, present in refused.items() if present]
        if found:
            raise UnsupportedFeature(
                f"mla.cuda: bi_patch has no certificate for {', '.join(found)}. Use --attention-backend {_BACKEND} on "
                "Hopper and the default options, or set BI_PATCH=0"
            )

    return __init__


def _rows(original):
    """FlashAttnMLAMetadataBuilder.__init__: requests of any length take the absorbed form."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.reorder_batch_threshold = _ALL

    return __init__


def _query(original):
    """FlashAttnMLAMetadataBuilder._build_decode: report a long query, so that every step takes the same tile."""

    @functools.wraps(original)
    def _build_decode(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        made.max_query_len = max(made.max_query_len, _LONG_QUERY)
        return made

    return _build_decode


def _schedule(original):
    """FlashAttnMLAMetadataBuilder._schedule_decode: schedule for the reported query, in one split."""

    @functools.wraps(original)
    def _schedule_decode(self, *, max_query_len, max_num_splits, **given):
        return original(self, max_query_len=max(max_query_len, _LONG_QUERY), max_num_splits=1, **given)

    return _schedule_decode


def _projection(original):
    """DeepSeekV2FusedQkvAProjLinear.__init__: turn off the kernel for few tokens, so that the layer takes a linear's
    certified route."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self._use_min_latency_gemm = False

    return __init__


def prepare(layer, page: int, q, k, v):
    """Write latents k [tokens, 1, D] into a cache, and return how to compute rows of the prompt q [tokens, heads, D].

    As chunks.Prepare; the rows are [tokens, heads, latent]. v is not used: a latent holds the value.
    """
    import torch
    from vllm.v1.attention.backends import fa_utils

    tokens, device, heads = len(q), q.device, q.shape[1]
    count = -(-tokens // page)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count)).to(device)
    at = torch.arange(tokens, device=device)
    cache = torch.zeros((count * page, k.shape[-1]), dtype=k.dtype, device=device)
    cache[order[at // page] * page + at % page] = k[:, 0]
    cache = cache.view(count, page, -1)
    latent = layer.kv_lora_rank

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    def run(sequences):
        longest = max(_LONG_QUERY, *(new for _, new in sequences))
        starts = [0]
        for _, new in sequences:
            starts.append(starts[-1] + new)
        lengths = [first + new for first, new in sequences]
        rows = torch.cat([at[first : first + new] for first, new in sequences])
        decode = Metadata(
            block_table=order.to(torch.int32).expand(len(sequences), -1).contiguous(),
            seq_lens=ints(lengths),
            query_start_loc=ints(starts),
            max_query_len=longest,
            max_seq_len=max(lengths),
            max_num_splits=1,
        )
        if fa_utils.get_flash_attn_version() == 3:
            decode.scheduler_metadata = fa_utils.get_scheduler_metadata(
                batch_size=len(sequences),
                max_seqlen_q=longest,
                max_seqlen_k=max(lengths),
                num_heads_q=heads,
                num_heads_kv=1,
                headdim=q.shape[-1] - latent,
                cache_seqlens=decode.seq_lens,
                qkv_dtype=q.dtype,
                headdim_v=latent,
                page_size=page,
                cu_seqlens_q=decode.query_start_loc,
                causal=True,
                num_splits=1,
            )
        query = q[rows]
        return layer.impl.forward_mqa(
            (query[..., :latent].contiguous(), query[..., latent:].contiguous()), cache, Metadata(decode=decode), layer
        )[0]

    return run


def _seam(name: str, qualname: str, close, why: str, how: str, causes, module: str = _FLASH, **given) -> Seam:
    return Seam(
        name=f"mla.cuda_{name}",
        targets=(Target(module, qualname, _RELEASES),),
        releases=_RELEASES,
        close=close,
        why=why,
        how=how,
        causes=causes,
        **given,
    )


SEAMS = (
    _seam(
        "backend",
        "MLAAttention.__init__",
        _init,
        "a backend whose form, split or tile depends on the batch gives bits that depend on the batch",
        "bi_patch refuses every backend of MLA but FlashAttention-MLA, and options without a certificate",
        (3, 4),
        _LAYER,
        until="never: bi_patch itself decides here which backends it accepts",
        serves=("MLAAttention", "MultiHeadLatentAttentionWrapper"),
    ),
    _seam(
        "rows",
        "FlashAttnMLAMetadataBuilder.__init__",
        _rows,
        "requests of more than 512 new tokens take the form with up-projected keys and values, whose bits differ. So "
        "the chunk budget, the prefix cache and a preemption decide the bits",
        "every token takes the absorbed form",
        (6, 7, 9),
        until="upstream chooses the form by position (https://github.com/vllm-project/vllm/issues/27433)",
    ),
    _seam(
        "query",
        "FlashAttnMLAMetadataBuilder._build_decode",
        _query,
        "FlashAttention 3 chooses a tile by the longest query of the batch",
        "bi_patch reports a longest query of at least 128 tokens",
        (4, 25),
        until="FlashAttention 3 uses one KV tile per head size (https://github.com/vllm-project/vllm/issues/51902)",
    ),
    _seam(
        "schedule",
        "FlashAttnMLAMetadataBuilder._schedule_decode",
        _schedule,
        "the schedule of a step splits KV by the batch",
        "the schedule is made for one split and for the reported query",
        (3,),
        until="upstream's batch-invariant mode schedules as bi_patch does",
    ),
    _seam(
        "projection",
        "DeepSeekV2FusedQkvAProjLinear.__init__",
        _projection,
        "a special kernel serves up to 16 tokens of DeepSeek-V3's low-rank projection",
        "bi_patch turns this kernel off, so the projection is a linear layer with a certified route",
        (1,),
        "vllm.model_executor.models.deepseek_v2",
        until="upstream's mode turns the kernel off",
    ),
)
