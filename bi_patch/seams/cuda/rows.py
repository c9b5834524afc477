"""Which operations of a loaded model get a row certificate, and how to call them: the model's own layers are called."""

import inspect
import itertools

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops.row_checks import FEW, ROWS, RowCheck
from bi_patch.seams import library
from bi_patch.seams.cuda import norm as norms
from bi_patch.seams.cuda import packed_experts, quantized, scaled_linear
from bi_patch.seams.naming import dotted


def checks(model, dtype, vocab: int):
    """A RowCheck for each distinct norm, activation, rotary embedding, router, INT8 or NVFP4 linear and layer of packed
    experts of a model, and for sampling.

    dtype: of the model's rows. vocab: the number of logits of a row, 0 for a model that samples nothing. Raises
    UnsupportedFeature, with the layer's class, for a norm whose size is unknown. A function that is not a module, e.g.
    an activation in a layer's own code, has no check.
    """
    seen = set()
    sampled = of_sampling(vocab) if vocab else ()
    of_model = (_of_layers, _quantizers, _int8, _nvfp4, packed_experts.checks)
    for check in itertools.chain(*(made(model, dtype) for made in of_model), sampled):
        if (check.operation, check.problem) not in seen:
            seen.add((check.operation, check.problem))
            yield check


def _of_layers(model, dtype):
    for module in model.modules():
        yield from _norm(module, dtype)
        yield from _norms_over_heads(module, dtype)
        yield from _activations(module, dtype)
        yield from _rotation(module, dtype)
        yield from _router(module, dtype)


def _quantizers(model, dtype):
    for form, k, run in scaled_linear.quantizers(model):
        name = f"e4m3 {form} {str(dtype).removeprefix('torch.')}"
        yield RowCheck("cuda.quantization", name, ROWS, _random(dtype, k), run)


def _int8(model, dtype):
    """INT8 linears run on vLLM's own kernel: sums of integers are exact, whatever their order. The certificate shows
    that scales belong to a row, and that the kernels for all numbers of rows round alike."""
    for _, layer, kernel in quantized.layers(model, (quantized.INT8,)):
        weight, *_ = kernel._get_layer_params(layer)
        bias = None if getattr(layer, "skip_bias_add", False) else getattr(layer, "bias", None)
        form = "static" if kernel.config.is_static_input_scheme else "by row"
        name = f"int8 {form} K={weight.shape[0]} N={weight.shape[1]}{'' if bias is None else ' bias'} {dtype}"

        def run(x, held=(kernel, layer, bias)):
            return (held[0].apply_weights(held[1], x, held[2]),)

        yield RowCheck("cuda.int8_linear", name.replace("torch.", ""), ROWS, _random(dtype, weight.shape[0]), run)


def _nvfp4(model, dtype):
    """Linears with NVFP4 weights run on Humming's batch-invariant schedules as they are."""
    for _, layer, kernel in quantized.layers(model, (quantized.NVFP4,)):
        n, k = layer.output_size_per_partition, layer.input_size_per_partition
        bias = None if getattr(layer, "skip_bias_add", False) else getattr(layer, "bias", None)

        def run(x, held=(kernel, layer, bias)):
            return (held[0].apply_weights(held[1], x, held[2]),)

        name = f"nvfp4 K={k} N={n}{'' if bias is None else ' bias'} {str(dtype).removeprefix('torch.')}"
        # The kernels are compiled at their first call, which must see real data.
        yield RowCheck("cuda.nvfp4_linear", name, ROWS, _random(dtype, k), run, indexes=True, library=library.humming())


def _name(layer, *sizes, dtype) -> str:
    return " ".join([type(layer).__name__, *map(str, sizes), str(dtype).removeprefix("torch.")])


def _random(dtype, *sizes):
    """make(rows, generator) for one input [rows, *sizes]."""

    def make(rows, generator):
        import torch

        return (torch.randn((rows, *sizes), generator=generator, device="cuda").to(dtype),)

    return make


def _norm(module, dtype):
    from torch import nn

    if not any(kind.__name__ in ("RMSNorm", "GemmaRMSNorm", "LayerNorm") for kind in type(module).__mro__):
        return
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and not weight.is_cuda:
        return  # a layer of another device
    sizes = _sizes(module, weight)
    words = [f"without {name}" for name in ("weight", "bias") if not _has(module, name)]

    def run(x, *residual):
        out = module(x, *residual)
        return tuple(part for part in (out if isinstance(out, tuple) else (out,)) if part is not None)

    name = _name(module, *sizes, *words, dtype=dtype)
    yield RowCheck("cuda.norm", name, ROWS, _random(dtype, *sizes), run)
    native = getattr(type(module), "forward_native", None)
    if native is not None and "residual" in inspect.signature(native).parameters:
        both = _random(dtype, 2, *sizes)
        yield RowCheck(
            "cuda.norm",
            f"{name} with residual",
            ROWS,
            both,
            lambda x: run(x[:, 0].contiguous(), x[:, 1].contiguous()),
        )


def _norms_over_heads(module, dtype):
    """The norms of an attention layer over all heads of its queries, and of its keys."""
    q_norm, k_norm = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
    if not callable(getattr(type(q_norm), "forward_qk", None)):
        return
    q_size, k_size = (norm.weight.shape[0] for norm in (q_norm, k_norm))
    ranks = getattr(q_norm, "tp_world", 1)

    def run(x):  # as vLLM's attention does, norm parts of one tensor
        parts = x.split([q_size, k_size], dim=-1)
        if ranks > 1:  # without the sum over ranks: another rank may have this certificate already, and would not come
            return norms.over_ranks(q_norm, k_norm, *parts, lambda sums: sums)
        return type(q_norm).forward_qk(q_norm, k_norm, *parts)

    name = _name(q_norm, q_size, k_size, *([f"of {ranks} ranks"] if ranks > 1 else []), dtype=dtype)
    yield RowCheck("cuda.norm", name, ROWS, _random(dtype, q_size + k_size), run)


def _sizes(module, weight) -> tuple[int, ...]:
    """The size of a norm's row, one number or more, e.g. (heads, head size)."""
    known = getattr(module, "normalized_shape", None) or getattr(module, "hidden_size", None)
    if weight is not None:
        return tuple(weight.shape)
    if known is None:
        kind = type(module)
        raise UnsupportedFeature(
            f"linear.cuda_certify: the norm {kind.__module__}.{kind.__qualname__} has no weight and tells no size, so "
            "bi_patch cannot certify it. Use another model, or set BI_PATCH=0"
        )
    return (known,) if isinstance(known, int) else tuple(known)


def _has(module, name: str) -> bool:
    """Whether a norm uses its weight or bias: RMSNorm holds a weight that it does not use."""
    return getattr(module, name, None) is not None and getattr(module, f"has_{name}", True)


def _activations(module, dtype):
    """The activations of a feed-forward layer, gated or not. They follow its first product, or its gate_up_proj."""
    for name, act in module.named_children():
        if name == "act_fn" or _is_activation(act):
            size = _width(module)
            method = getattr(getattr(act, "_forward_method", None), "__name__", "forward")
            yield RowCheck(
                "cuda.activation",
                f"{_name(act, size, dtype=dtype)} {method}",
                ROWS,
                _random(dtype, size),
                lambda x, act=act: (act(x),),
            )


_ACTIVATIONS = ("vllm.model_executor.layers.activation", "torch.nn.modules.activation")
_NO_ACTIVATIONS = ("MultiheadAttention", "Softmax", "LogSoftmax", "Softmin", "Softmax2d")


def _is_activation(module) -> bool:
    return type(module).__module__ in _ACTIVATIONS and type(module).__name__ not in _NO_ACTIVATIONS


def _width(module) -> int:
    """The width of the rows that a layer's activation gets. Elements are computed alone, so any width would do."""
    products = [getattr(module, "gate_up_proj", None), *module.children()]
    weights = [weight for product in products if (weight := getattr(product, "weight", None)) is not None]
    return next((weight.shape[0] for weight in weights if weight.ndim == 2), _WIDE)


_WIDE = 4096
_LONGEST = 4096  # positions
_BY_HEAD = ("DeepseekScalingRotaryEmbedding",)  # they take [rows, heads, head size]


def _rotation(module, dtype):
    """The rotary embeddings of an attention layer, for its numbers of heads."""
    for rotary in module.children():
        if not any("RotaryEmbedding" in kind.__name__ for kind in type(rotary).__mro__):
            continue
        computes = getattr(rotary, "forward_native", rotary.forward)
        if list(inspect.signature(computes).parameters)[:3] == ["positions", "query", "key"]:
            yield _rotary_check(rotary, *_head_sizes(module, rotary), dtype)
            if getattr(rotary, "mrope_section", None):
                yield _sections_check(rotary, *_head_sizes(module, rotary), dtype)


def _head_sizes(module, rotary) -> tuple[int, int]:
    """The widths of queries and keys of an attention layer: its own numbers, its attention's, or those of 2 heads on 1
    if the layer tells none."""
    q_size, kv_size = (getattr(module, name, None) for name in ("q_size", "kv_size"))
    if q_size is not None and kv_size is not None:
        return q_size, kv_size
    attn = getattr(module, "attn", None)
    size = getattr(attn, "head_size", rotary.head_size)
    return getattr(attn, "num_heads", 2) * size, getattr(attn, "num_kv_heads", 1) * size


def _rotary_check(rotary, q_size: int, kv_size: int, dtype) -> RowCheck:
    cache = getattr(rotary, "cos_sin_cache", None)
    longest = min(_LONGEST if cache is None else cache.shape[0], _LONGEST)

    def make(rows, generator):
        import torch

        x = torch.randn((rows, q_size + kv_size), generator=generator, device="cuda").to(dtype)
        positions = torch.randint(longest, (rows,), generator=generator, device="cuda")
        q, k = x[:, :q_size].contiguous(), x[:, q_size:].contiguous()
        if type(rotary).__name__ in _BY_HEAD:
            q, k = (part.unflatten(-1, (-1, rotary.head_size)) for part in (q, k))
        return positions, q, k

    words = ("head_size", "rotary_dim", "is_neox_style")
    form = (f"{word}={value}" for word in words if (value := getattr(rotary, word, None)) is not None)
    name = _name(rotary, q_size, kv_size, *form, dtype=dtype)
    return RowCheck("cuda.rotary", name, ROWS, make, lambda at, q, k: rotary(at, q, k))


def _sections_check(rotary, q_size: int, kv_size: int, dtype) -> RowCheck:
    """Rotations by sections (M-RoPE): a token has a position for each of time, height and width."""
    longest, count = min(_LONGEST, rotary.cos_sin_cache.shape[0]), len(rotary.mrope_section)

    def make(rows, generator):
        import torch

        x = torch.randn((rows, q_size + kv_size), generator=generator, device="cuda").to(dtype)
        positions = torch.randint(longest, (rows, count), generator=generator, device="cuda")
        return positions, x

    def run(positions, x):
        # As vLLM's attention does, rotate parts of one tensor.
        return tuple(part.contiguous() for part in rotary(positions.T, *x.split([q_size, kv_size], dim=-1)))

    form = f"sections={rotary.mrope_section} interleaved={getattr(rotary, 'mrope_interleaved', False)}"
    if hasattr(rotary, "is_neox_style"):
        form += f" is_neox_style={rotary.is_neox_style}"
    name = f"{_name(rotary, q_size, kv_size, dtype=dtype)} head_size={rotary.head_size} {form}"
    return RowCheck("cuda.rotary", name, ROWS, make, run)


def _router(module, dtype):
    """The router of a layer of experts, on logits that tie now and then."""
    router, config = getattr(module, "router", None), getattr(module, "moe_config", None)
    if config is None or not hasattr(router, "select_experts"):
        return
    hidden, own = config.hidden_dim, hasattr(router, "zero_expert_output")
    # A router with zero experts, which hand on their input, has logits and a bias for these, too.
    experts = len(router.e_score_correction_bias) if own else config.num_experts
    logits_type = getattr(config, "router_logits_dtype", None) or dtype

    def make(rows, generator):
        import torch

        x = torch.randn((rows, hidden), generator=generator, device="cuda").to(dtype)
        logits = torch.randn((rows, experts), generator=generator, device="cuda").mul(8).round().div(4)
        return x, logits.to(logits_type)

    def run(x, logits):
        chosen = router.select_experts(x, logits)
        return (*chosen, router.zero_expert_output) if own else chosen

    name = _name(router, f"E={experts}", f"top{config.experts_per_token}", *_way(router), dtype=logits_type)
    # A model's own routing may use a kernel's result as an index.
    yield RowCheck("cuda.router", name, ROWS, make, run, indexes=True)


def _way(router) -> list[str]:
    """What decides a router's kernel, in words. Functions count by their dotted names, tensors by their presence."""
    words = []
    for name, value in sorted(vars(router).items()):
        if name.lstrip("_") in _WAYS and value is not None:
            known = isinstance(value, (bool, int, float, str))
            words.append(f"{name}={value}" if known else f"{name}={dotted(value)}" if callable(value) else name)
    return words


# What vLLM's routers branch on, in every release.
_WAYS = (
    "scoring_func",
    "renormalize",
    "use_grouped_topk",
    "num_expert_group",
    "topk_group",
    "num_fused_shared_experts",
    "routed_scaling_factor",
    "e_score_correction_bias",
    "custom_routing_function",
    "apply_router_weight_on_input",
)


def of_sampling(vocab: int):
    """Logprobs, top-k and top-p, ties and draws over `vocab` logits, of both model runners."""
    import torch
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.gpu.sample import gumbel, logprob

    def logits(rows, generator):
        return (torch.randn((rows, vocab), generator=generator, device="cuda").mul(4),)

    def tied(rows, generator):
        x = torch.randn((rows, vocab), generator=generator, device="cuda").mul(4).round()
        return x, torch.randint(vocab, (rows,), generator=generator, device="cuda")

    def limited(rows, generator):
        numbers = torch.arange(rows, device="cuda")
        p = 0.5 + 0.5 * torch.rand(rows, generator=generator, device="cuda")
        return *logits(rows, generator), (1 + numbers % 50).to(torch.int32), p

    def drawn(rows, generator):
        seeds = torch.randint(2**40, (rows,), generator=generator, device="cuda")
        return *logits(rows, generator), seeds, torch.arange(rows, device="cuda")

    def draw(x, seeds, positions):
        known = inspect.signature(gumbel.gumbel_sample).parameters
        further = {"is_drafting": False} if "is_drafting" in known else {}
        index = torch.arange(len(x), dtype=torch.int32, device="cuda")
        ones = torch.ones(len(x), device="cuda")
        return (gumbel.gumbel_sample(x, index, ones, seeds, positions, True, **further),)

    topk = next(getattr(logprob, n) for n in ("compute_topk_scores", "compute_topk_logprobs") if hasattr(logprob, n))
    kinds = (
        ("log_softmax", logits, lambda x: (Sampler.compute_logprobs(x),)),
        ("logprobs of tokens", tied, lambda x, ids: (logprob.compute_token_logprobs(x, ids[:, None]),)),
        ("top 20 with ties", tied, lambda x, ids: tuple(topk(x, min(20, vocab), ids)[:2])),
        ("argmax with ties", tied, lambda x, _: (x.argmax(-1),)),
        ("top-k and top-p", limited, lambda x, k, p: (topk_topp_sampler.apply_top_k_top_p(x, k, p),)),
        ("top-p", limited, lambda x, _, p: (topk_topp_sampler.apply_top_k_top_p(x, None, p),)),
        ("seeded draw", drawn, draw),
    )
    for name, make, run in kinds:
        yield RowCheck("cuda.sampling", f"{name} vocab={vocab}", FEW, make, run)
