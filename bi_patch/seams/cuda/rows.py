"""Which operations of a loaded model get a row certificate, and how to call them: the model's own layers are called."""

import inspect
import itertools

from bi_patch.ops.row_checks import FEW, ROWS, RowCheck
from bi_patch.seams.naming import dotted


def checks(model, dtype, vocab: int):
    """A RowCheck for each distinct norm, activation, rotary embedding and router of a model, and for sampling.

    A layer without one gets none: a norm without weights or with a weight of several dimensions, an activation that
    follows another product than gate_up_proj, a rotation of an attention layer that does not name its sizes.
    dtype: of the model's rows. vocab: the number of logits of a row.
    """
    seen = set()
    for check in itertools.chain(_of_layers(model, dtype), _of_sampling(vocab)):
        if (check.operation, check.problem) not in seen:
            seen.add((check.operation, check.problem))
            yield check


def _of_layers(model, dtype):
    for module in model.modules():
        yield from _norm(module, dtype)
        yield from _activation(module, dtype)
        yield from _rotation(module, dtype)
        yield from _router(module, dtype)


def _name(layer, *sizes, dtype) -> str:
    return " ".join([type(layer).__name__, *map(str, sizes), str(dtype).removeprefix("torch.")])


def _random(dtype, *sizes):
    """make(rows, generator) for one input [rows, *sizes]."""

    def make(rows, generator):
        import torch

        return (torch.randn((rows, *sizes), generator=generator, device="cuda").to(dtype),)

    return make


def _norm(module, dtype):
    weight = getattr(module, "weight", None)
    if not any(kind.__name__ in ("RMSNorm", "GemmaRMSNorm", "LayerNorm") for kind in type(module).__mro__):
        return
    if weight is None or weight.ndim != 1 or not weight.is_cuda:
        return
    size = weight.shape[0]

    def run(x, *residual):
        out = module(x, *residual)
        return tuple(part for part in (out if isinstance(out, tuple) else (out,)) if part is not None)

    yield RowCheck("cuda.norm", _name(module, size, dtype=dtype), ROWS, _random(dtype, size), run)
    native = getattr(type(module), "forward_native", None)
    if native is not None and "residual" in inspect.signature(native).parameters:
        name = f"{_name(module, size, dtype=dtype)} with residual"
        both = _random(dtype, 2, size)
        yield RowCheck("cuda.norm", name, ROWS, both, lambda x: run(x[:, 0].contiguous(), x[:, 1].contiguous()))


def _activation(module, dtype):
    """The gated activation of a feed-forward layer: it follows the product gate_up_proj."""
    act, product = getattr(module, "act_fn", None), getattr(module, "gate_up_proj", None)
    weight = getattr(product, "weight", None)
    if act is None or weight is None or weight.ndim != 2 or not weight.is_cuda:
        return
    size = weight.shape[0]
    method = getattr(getattr(act, "_forward_method", None), "__name__", "forward")
    yield RowCheck(
        "cuda.activation", f"{_name(act, size, dtype=dtype)} {method}", ROWS, _random(dtype, size), lambda x: (act(x),)
    )


def _rotation(module, dtype):
    rotary = getattr(module, "rotary_emb", None)
    q_size, kv_size = (getattr(module, name, None) for name in ("q_size", "kv_size"))
    if not hasattr(rotary, "cos_sin_cache") or q_size is None or kv_size is None:
        return
    longest = min(rotary.cos_sin_cache.shape[0], 4096)

    def make(rows, generator):
        import torch

        x = torch.randn((rows, q_size + kv_size), generator=generator, device="cuda").to(dtype)
        positions = torch.randint(longest, (rows,), generator=generator, device="cuda")
        return positions, x[:, :q_size].contiguous(), x[:, q_size:].contiguous()

    yield RowCheck(
        "cuda.rotary", _name(rotary, q_size, kv_size, dtype=dtype), ROWS, make, lambda at, q, k: rotary(at, q, k)
    )


def _router(module, dtype):
    """The router of a layer of experts, on logits that tie now and then."""
    router, config = getattr(module, "router", None), getattr(module, "moe_config", None)
    if config is None or not hasattr(router, "select_experts"):
        return
    experts, hidden = config.num_experts, config.hidden_dim
    logits_type = getattr(config, "router_logits_dtype", None) or dtype

    def make(rows, generator):
        import torch

        x = torch.randn((rows, hidden), generator=generator, device="cuda").to(dtype)
        logits = torch.randn((rows, experts), generator=generator, device="cuda").mul(8).round().div(4)
        return x, logits.to(logits_type)

    name = _name(router, f"E={experts}", f"top{config.experts_per_token}", *_way(router), dtype=logits_type)
    yield RowCheck("cuda.router", name, ROWS, make, lambda x, logits: router.select_experts(x, logits))


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


def _of_sampling(vocab: int):
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
