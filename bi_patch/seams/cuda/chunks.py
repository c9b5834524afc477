"""How the certificates of attention call a layer's own code: rows of one prompt in any cut, or prompts side by side."""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops.cuda import prompts, spans
from bi_patch.ops.cuda.chunks import Problem
from bi_patch.seams.cuda.attention import ENCODER, eighth, reported_query

# vLLM's classes of MLA layers: of most models, and of Kimi Linear.
_LATENT = ("MLAAttention", "MultiHeadLatentAttention")


class Metadata:
    """What a backend's forward reads about a step. Everything that is not given is None, as in a plain step."""

    def __init__(self, **given):
        self.__dict__.update(given)

    def __getattr__(self, name):
        return None


def layers(config):
    """Each kind of attention layer of a loaded model, with the function that computes rows of a prompt by such a layer.

    config: the engine's VllmConfig. The problems of layers without a cache are prompts.Problem, of others Problem.
    """
    from vllm.model_executor.layers.attention.attention import Attention

    page = config.cache_config.block_size or 16
    found = {}
    for layer in config.compilation_config.static_forward_context.values():
        if isinstance(layer, Attention):
            found.setdefault(_problem(layer, page), layer)
    for problem, layer in found.items():
        call = _encode if isinstance(problem, prompts.Problem) else _prepare
        yield problem, functools.partial(call, layer, problem)
        if call is _prepare and getattr(layer, "use_mm_prefix", False):
            yield spans.Problem(*problem), functools.partial(_prepare_spans, layer, problem)
    yield from _latent(config, page)


def _latent(config, page: int):
    """The same for each kind of MLA layer, in each form that it takes."""
    from bi_patch.seams.cuda import mla_samples, mla_steps

    found = {}
    for layer in config.compilation_config.static_forward_context.values():
        if any(kind.__name__ in _LATENT for kind in type(layer).__mro__):
            name = layer.attn_backend.get_name()
            kind = Problem(name, layer.num_heads, 1, layer.head_size, 0, page, config.model_config.dtype)
            if is_eighth(layer):
                if layer._k_scale.numel() > 1 or float(layer._k_scale) != 1.0:
                    raise UnsupportedFeature(
                        "mla.cuda: bi_patch covers an FP8 KV cache of MLA with a scale of 1 only. Use --kv-cache-dtype "
                        "auto, or set BI_PATCH=0"
                    )
                kind = kind._replace(extras="e4m3 KV")
            found.setdefault(kind, layer)
    for problem, layer in found.items():
        if not mla_steps.two_forms():
            yield problem, functools.partial(mla_samples.prepare, layer, page)
            continue
        problem = problem._replace(head_size=layer.qk_nope_head_dim + layer.qk_rope_head_dim)
        for extras, prepare in (("rows", mla_samples.prepare_rows), ("prompts", mla_samples.prepare_prompt)):
            extras = " ".join(filter(None, (extras, problem.extras)))
            yield problem._replace(extras=extras), functools.partial(prepare, layer, page)


def _problem(layer, page: int) -> Problem | prompts.Problem:
    impl = layer.impl
    per_head = is_eighth(layer) and max(layer._k_scale.numel(), layer._v_scale.numel()) > 1
    if per_head and layer.attn_backend.get_name() != "FLASH_ATTN":
        raise UnsupportedFeature(
            f"attention.cuda_backend: no test covers an FP8 KV cache with a scale for each head on "
            f"{layer.attn_backend.get_name()}. Use --kv-cache-dtype bfloat16 or float16, the model's own type, or set "
            "BI_PATCH=0"
        )
    version = getattr(impl, "vllm_flash_attn_version", None)
    extras = {
        "sinks": getattr(impl, "sinks", None) is not None,
        "alibi": getattr(impl, "alibi_slopes", None) is not None,
        "e4m3 KV": is_eighth(layer),
        "scales by head": per_head,  # a certificate with one scale for all heads does not show these
        "sqrt": bool(getattr(impl, "use_alibi_sqrt", False)),
        f"softcap={getattr(impl, 'logits_soft_cap', 0)}": bool(getattr(impl, "logits_soft_cap", 0)),
        f"lookback={getattr(impl, 'chunk_lookback', -1)}": getattr(impl, "chunk_lookback", -1) != -1,
    }
    given = {
        "backend": layer.attn_backend.get_name() + (f" {version}" if version else ""),
        "heads": layer.num_heads,
        "key_heads": layer.num_kv_heads,
        "head_size": layer.head_size,
        "window": layer.sliding_window or 0,
        "dtype": layer.dtype,
        "extras": " ".join(word for word, holds in extras.items() if holds),
    }
    return prompts.Problem(page=0, **given) if layer.attn_type == ENCODER else Problem(page=page, **given)


def _encode(layer, problem: prompts.Problem, q, k, v, lengths):
    """The rows of several prompts, side by side, by a layer that has no cache."""
    import torch

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device=q.device)

    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    longest = reported_query(max(lengths), problem.head_size, False)
    out = torch.empty_like(q)
    known = Metadata(
        num_actual_tokens=len(q),
        max_query_len=longest,
        query_start_loc=ints(starts),
        max_seq_len=longest,
        seq_lens=ints(lengths),
        use_cascade=False,
        causal=False,
        max_num_splits=1,
    )
    layer.impl.forward(layer, q, k, v, None, known, out)
    return out


def is_eighth(layer) -> bool:
    """Whether a layer keeps keys and values as 8-bit floats."""
    return eighth(getattr(layer, "kv_cache_dtype", None))


def _prepare(layer, problem: Problem, q, k, v):
    """Write k and v of a prompt into a cache as vLLM does, and return how to compute rows of the prompt."""
    import torch

    from bi_patch.ops.cuda import attention

    tokens, device = len(q), q.device
    count = -(-tokens // problem.page)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count)).to(device)
    cache = _cache(layer, problem, count, device)
    at = torch.arange(tokens, device=device)
    layer.impl.do_kv_cache_update(layer, k, v, cache, order[at // problem.page] * problem.page + at % problem.page)
    cache_type = torch.float8_e4m3fn if is_eighth(layer) else None
    kind = attention.Problem(problem.heads, problem.key_heads, problem.head_size, problem.dtype, cache_type)
    bundled = attention.serves(kind)

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    def run(sequences, ranges=None):
        longest = max(count for _, count in sequences)
        starts = [0]
        for _, new in sequences:
            starts.append(starts[-1] + new)
        lengths = [first + new for first, new in sequences]
        rows = torch.cat([at[first : first + new] for first, new in sequences])
        query = q[rows]
        out = torch.empty_like(query)
        known = Metadata(
            num_actual_tokens=len(rows),
            max_query_len=reported_query(longest, problem.head_size, longest == 1 and bundled),
            query_start_loc=ints(starts),
            max_seq_len=max(lengths),
            seq_lens=ints(lengths),
            block_table=order.to(torch.int32).expand(len(sequences), -1).contiguous(),
            slot_mapping=order[rows // problem.page] * problem.page + rows % problem.page,
            use_cascade=False,
            causal=True,
            max_num_splits=1,
            mm_prefix_range_tensor=ranges,
        )
        layer.impl.forward(layer, query, k[rows], v[rows], cache, known, out)
        return out

    return run


def _prepare_spans(layer, problem: Problem, q, k, v):
    """`_prepare` for a prompt with spans that attend in both directions, which Triton attention gets as ranges."""
    import torch

    run = _prepare(layer, problem, q, k, v)
    own = spans.of(problem)
    none = [(0, 0)] * len(own)

    def run_spans(step, named):
        ranges = [own if marked else none for _, _, marked in step]
        given = torch.tensor(ranges, dtype=torch.int32, device=q.device) if named else None
        return run([(first, count) for first, count, _ in step], given)

    return run_spans


def _cache(layer, problem: Problem, pages: int, device):
    """An empty KV cache of one layer, with the shape and the strides that vLLM would give it."""
    import torch

    backend = layer.attn_backend
    if hasattr(backend, "get_kv_cache_shape"):  # until vLLM 0.26, each backend has a shape of its own
        shape = backend.get_kv_cache_shape(pages, problem.page, problem.key_heads, problem.head_size)
        order = backend.get_kv_cache_stride_order()
    else:  # pages, heads, tokens, a key and a value; in memory, tokens come before heads
        shape = (pages, problem.key_heads, problem.page, 2 * problem.head_size)
        order = (0, 2, 1, 3)
    dtype = layer.kv_cache_torch_dtype if is_eighth(layer) else problem.dtype
    laid_out = torch.zeros([shape[i] for i in order], dtype=dtype, device=device)
    return laid_out.permute([order.index(i) for i in range(len(shape))])
