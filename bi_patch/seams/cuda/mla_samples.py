"""Made latents in a made cache, with which certificates of MLA compute rows of a prompt in any company."""

from bi_patch.seams.cuda import mla_eighths, mla_prompts, mla_rows
from bi_patch.seams.cuda.attention import eighth
from bi_patch.seams.cuda.chunks import Metadata


def _paged(layer, page: int, latents):
    """Latents [tokens, D] in a cache whose pages are in disorder: the cache, and the order of its pages."""
    import torch

    tokens, device = len(latents), latents.device
    count = -(-tokens // page)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count)).to(device)
    at = torch.arange(tokens, device=device)
    cache = torch.zeros((count * page, latents.shape[-1]), dtype=latents.dtype, device=device)
    cache[order[at // page] * page + at % page] = latents
    return cache.view(count, page, -1), order.to(torch.int32)


def _stored(layer, page: int, latents):
    """As `_paged`, in the type of the layer's cache."""
    if not eighth(layer.kv_cache_dtype):
        return _paged(layer, page, latents)
    import torch

    cache, order = _paged(layer, page, latents.to(mla_eighths.e4m3()).view(torch.uint8))
    return cache.view(mla_eighths.e4m3()), order


def prepare_rows(layer, page: int, q, k, v):
    """As `prepare`, for generated tokens in two forms: each row is a sequence of its own, and the products with the
    up-projection belong to it. q: [tokens, heads, nope + rotary]. The rows are [tokens, heads, D]."""
    import torch

    tokens, device = len(q), q.device
    cache, order = _stored(layer, page, _latents(layer, tokens, q))
    if eighth(layer.kv_cache_dtype):
        rows, generate = mla_eighths.Rows(), mla_eighths.generate
    else:
        rows = mla_rows.Rows(q.shape[1], layer.kv_lora_rank, layer.qk_rope_head_dim, page, q.dtype, device, tokens)
        rows.check()
        generate = mla_rows.generate

    def run(sequences):
        at = [row for first, new in sequences for row in range(first, first + new)]
        lengths = torch.tensor([row + 1 for row in at], dtype=torch.int32, device=device)
        step = Metadata(decode=rows.make(order.expand(len(at), -1).contiguous(), lengths, max(at) + 1))
        out = q.new_empty((len(at), q.shape[1] * layer.v_head_dim))
        generate(layer, q[at], cache, step, out)
        return out.view(len(at), q.shape[1], layer.v_head_dim)

    return run


def _latents(layer, tokens: int, like):
    """Random latents [tokens, D]."""
    import torch

    generator = torch.Generator(like.device).manual_seed(tokens)
    return torch.randn((tokens, layer.head_size), generator=generator, device=like.device).to(like.dtype)


def prepare_prompt(layer, page: int, q, k, v):
    """As `prepare_rows`, for prompts in two forms."""
    import torch

    tokens, device, impl = len(q), q.device, layer.impl
    latents = _latents(layer, tokens, q)
    cache, order = _stored(layer, page, latents)
    workspace = torch.empty((3 * tokens, layer.head_size), dtype=q.dtype, device=device)

    def run(sequences):
        table = order.expand(len(sequences), -1).contiguous()
        segments, at, first = [], [], 0
        for request, (begin, new) in enumerate(sequences):
            segments.append(mla_prompts.Segment(first, new, begin + new, request))
            at += range(begin, begin + new)
            first += new
        out = q.new_empty((len(at), impl.num_heads * impl.v_head_dim))
        low, turned = latents[at, : layer.kv_lora_rank], latents[at, layer.kv_lora_rank :].unsqueeze(1)
        for some in mla_prompts.groups(segments, len(workspace)):
            group = mla_prompts.Group(some, table, workspace, device)
            mla_prompts.attend(impl, q[at], low, turned, cache, group, out)
        return out.view(len(at), impl.num_heads, impl.v_head_dim)

    return run


def prepare(layer, page: int, q, k, v):
    """Write latents k [tokens, 1, D] into a cache, and return how to compute rows of the prompt q [tokens, heads, D].

    As chunks.Prepare; the rows are [tokens, heads, latent]. v is not used: a latent holds the value.
    """
    import torch
    from vllm.v1.attention.backends import fa_utils

    tokens, device, heads = len(q), q.device, q.shape[1]
    at = torch.arange(tokens, device=device)
    cache, order = _paged(layer, page, k[:, 0])
    latent = layer.kv_lora_rank

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    def run(sequences):
        longest = max(mla_prompts.LONG_QUERY, *(new for _, new in sequences))
        starts = [0]
        for _, new in sequences:
            starts.append(starts[-1] + new)
        lengths = [first + new for first, new in sequences]
        rows = torch.cat([at[first : first + new] for first, new in sequences])
        decode = Metadata(
            block_table=order.expand(len(sequences), -1).contiguous(),
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
