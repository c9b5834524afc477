"""An FP8 (e4m3) KV cache on FlashAttention 3: what vLLM's FlashAttention backend calls instead for such layers.

Queries stay in 16 bits. FlashAttention 3 itself would add tiles of an FP8 cache in pairs, counted from a chunk's last
token. bi_patch.ops.cuda.eighths says what runs instead.
"""

import functools
import threading

from bi_patch.errors import UnsupportedFeature

KINDS = ("fp8", "fp8_e4m3")
_now = threading.local()  # step: how to compute the step of the running layer, or None


def serves(arguments, kind: str | None) -> bool:
    """Whether this route takes the layer that Attention.__init__ makes of its arguments. kind: of its KV cache, as vLLM
    names it. The caller has checked that FlashAttention 3 would serve the layer with a 16-bit cache."""
    import torch

    from bi_patch.kernels.cuda import decode

    heads, dtype = arguments.get("num_heads", 1), torch.get_default_dtype()
    extras = arguments.get("extra_impl_args", {})
    return (
        kind in KINDS
        and decode.covers(heads, arguments.get("num_kv_heads") or heads, arguments.get("head_size"), dtype)
        and arguments.get("attn_type", "decoder") == "decoder"
        and arguments.get("kv_sharing_target_layer_name") is None
        and not arguments.get("logits_soft_cap")
        and all(value is None for value in extras.values())
        and replaced()
    )


def replaced() -> bool:
    """Whether vLLM's FlashAttention calls this route for layers with an FP8 KV cache."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    return getattr(FlashAttentionImpl.forward, "bi_patch_eighths", False)


def with_step(forward):
    """FlashAttentionImpl.forward that tells `attend` how to compute the step, which the metadata says."""

    @functools.wraps(forward)
    def of_step(self, layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs):
        if self.kv_cache_dtype not in KINDS:
            return forward(self, layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
        _now.step = getattr(attn_metadata, "bi_patch_step", None)
        try:
            return forward(self, layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
        finally:
            _now.step = None

    of_step.bi_patch_eighths = True
    return of_step


def reads(builder) -> bool:
    """Whether the layers of a FlashAttentionMetadataBuilder have an FP8 KV cache."""
    return getattr(builder.kv_cache_dtype, "itemsize", 2) == 1


def problem_of(builder):
    """The decode problem of the layers of a builder that `reads` names."""
    import torch

    from bi_patch.ops.cuda.attention import Problem

    return Problem(
        *(builder.num_heads_q, builder.num_heads_kv, builder.headdim),
        *(builder.model_config.dtype, torch.float8_e4m3fn),
    )


def step_of(builder, common):
    """How to compute a step whose longest query has several tokens. common: vLLM's CommonAttentionMetadata."""
    from bi_patch.ops.cuda import attention, eighths

    number = common.num_reqs
    begins = common.query_start_loc_cpu[: number + 1].tolist()
    counts = [end - begin for begin, end in zip(begins, begins[1:])]
    known = common.seq_lens_cpu_upper_bound
    most = [common.max_seq_len] * number if known is None else known[:number].tolist()
    starts, lengths = common.query_start_loc[: number + 1], common.seq_lens[:number]
    few = attention.quick(max(counts, default=0), sum(counts), builder.headdim, builder.num_heads_kv)
    return eighths.plan(counts, most, starts, lengths, builder.num_heads_kv, eighths.room(builder.headdim), few)


def _step_of_call(given):
    """The same from the call's tensors, for calls without vLLM's builder: certificates. This waits for the GPU."""
    from bi_patch.ops.cuda import attention, eighths

    begins, lengths, k = given["cu_seqlens_q"].tolist(), given["seqused_k"], given["k"]
    counts = [end - begin for begin, end in zip(begins, begins[1:])]
    few = attention.quick(max(counts, default=0), sum(counts), k.shape[3], k.shape[2])
    room = eighths.room(k.shape[3])
    return eighths.plan(counts, lengths.tolist(), given["cu_seqlens_q"], lengths, k.shape[2], room, few)


def attend(flash, plain: bool, **given):
    """Serve a call of FlashAttention 3 whose keys and values are e4m3.

    flash: vLLM's function. plain: whether the call asks for nothing that the bundled kernel lacks.
    """
    from bi_patch.ops.cuda import attention

    q, k = given["q"], given["k"]
    _require(attention.Problem(q.shape[1], k.shape[2], q.shape[2], q.dtype, k.dtype), plain)
    scales = given["k_descale"][0], given["v_descale"][0]
    if given["max_seqlen_q"] == 1:
        rest = given["cu_seqlens_q"], given["seqused_k"], given["block_table"]
        return _decode(given, q, given["out"], *rest, scales)
    if _captures():
        raise UnsupportedFeature(
            "attention.cuda_decode: with an FP8 KV cache, no CUDA graph holds a step with queries of several tokens. "
            "Use cudagraph_mode FULL_AND_PIECEWISE, or set BI_PATCH=0"
        )
    step = getattr(_now, "step", None) or _step_of_call(given)
    for run in step.runs:
        _prefill(flash, given, run, scales)
    if step.singles is not None:
        _decode_singles(given, step.singles, scales)
    return given["out"]


def _require(problem, plain: bool = True) -> None:
    from bi_patch.ops.cuda import attention

    if plain and attention.serves(problem):
        return
    what = "its certificate failed" if plain else "the call asks for more than plain causal attention"
    raise UnsupportedFeature(
        f"attention.cuda_decode: the bundled kernel does not serve {problem}: {what}. Use --attention-backend "
        "TRITON_ATTN, or set BI_PATCH=0"
    )


def _captures() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _decode(given, q, out, starts, lengths, pages, scales):
    from bi_patch.ops.cuda import attention

    more = (given["softmax_scale"], given.get("max_seqlen_k"), scales)
    if not attention.attend(q, given["k"], given["v"], out, starts, lengths, pages, *more):
        raise UnsupportedFeature(
            f"attention.cuda_decode: the bundled kernel does not take queries {tuple(q.shape)} over an FP8 KV cache "
            f"{tuple(given['k'].shape)}. Use --attention-backend TRITON_ATTN, or set BI_PATCH=0"
        )
    return out


def _decode_singles(given, singles, scales) -> None:
    rows, requests = singles.rows, singles.requests
    q, out, pages = given["q"], given["out"], given["block_table"]
    if isinstance(rows, slice):
        _decode(given, q[rows], out[rows], singles.starts, singles.lengths, pages[requests], scales)
        return
    q, pages = q.index_select(0, rows), pages.index_select(0, requests)
    got = _decode(given, q, q.new_empty(q.shape), singles.starts, singles.lengths, pages, scales)
    out.index_copy_(0, rows, got)


def _prefill(flash, given, run, scales) -> None:
    """Run FlashAttention 3 over a 16-bit copy of the pages of some requests."""
    from bi_patch.ops.cuda import eighths

    tokens, requests, heads = slice(*run.tokens), slice(*run.requests), given["k"].shape[2]
    q, out, table = given["q"][tokens], given["out"][tokens], given["block_table"][requests]
    group = q.shape[1] // heads
    call = given | {
        "cu_seqlens_q": run.starts,
        "max_seqlen_q": longest_query(run.longest_query, q.shape[2]),
        "seqused_k": run.lengths,
        "max_seqlen_k": run.longest,
        "block_table": run.table,
        "scheduler_metadata": None,
        "q_descale": None,
        "k_descale": None,
        "v_descale": None,
    }
    for first in range(0, heads, run.heads):
        some, of_q = slice(first, first + run.heads), slice(first * group, (first + run.heads) * group)
        held = (given[name][:, :, some] for name in ("k", "v"))
        keys, values = eighths.widened(*held, tuple(scale[some] for scale in scales), table, run, q.dtype)
        flash(**call | {"q": q[:, of_q], "out": out[:, of_q], "k": keys, "v": values})


def longest_query(longest: int, head_size: int) -> int:
    """The longest query as FlashAttention 3 hears it: with small heads, always a long one."""
    from bi_patch.seams.cuda.attention import reported_query

    return reported_query(longest, head_size, False)


def prefill(q, k, v, pages, scale: float, scales):
    """Attention of the prompt q [tokens, heads, D] over e4m3 pages: what `attention.Prefill` says, with scales [key
    heads] of K and V."""
    import torch
    from vllm.v1.attention.backends import flash_attn

    from bi_patch.ops.cuda import eighths

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32, device=q.device)

    count, heads = len(q), k.shape[2]
    out = torch.empty_like(q)
    given = {
        **{"q": q, "k": k, "v": v, "out": out, "block_table": pages},
        **{"softmax_scale": scale, "causal": True, "window_size": [-1, -1], "fa_version": 3, "num_splits": 1},
    }
    step = eighths.plan([count], [count], ints(0, count), ints(count), heads, eighths.room(q.shape[2]))
    for run in step.runs:
        _prefill(flash_attn.flash_attn_varlen_func, given, run, scales)
    return out


def reserve(config) -> None:
    """Make the scratch of a loaded model's layers with an FP8 KV cache on FlashAttention 3, if it has such layers."""
    from bi_patch.ops.cuda import eighths

    found = [*layers(config)]
    if not found:
        return
    longest, most = config.model_config.max_model_len, config.scheduler_config.max_num_batched_tokens
    eighths.reserve(max(eighths.bytes_of(x.num_kv_heads, x.head_size, longest, most) for x in found))


def require(config) -> None:
    """Raise UnsupportedFeature unless the bundled kernel is certified for each such layer: nothing else serves it."""
    import torch

    from bi_patch.ops.cuda.attention import Problem

    for layer in layers(config):
        sizes = layer.num_heads, layer.num_kv_heads, layer.head_size
        _require(Problem(*sizes, layer.dtype, torch.float8_e4m3fn))


def layers(config):
    """The layers of a loaded model that take this route."""
    from vllm.model_executor.layers.attention.attention import Attention

    for layer in config.compilation_config.static_forward_context.values():
        if isinstance(layer, Attention) and layer.attn_backend.get_name() == "FLASH_ATTN":
            if getattr(layer, "kv_cache_dtype", None) in KINDS and getattr(layer, "attn_type", "decoder") == "decoder":
                yield layer
