"""Mixture-of-experts layers: tiles of the experts, and the router."""

import functools
import inspect

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Seam, Target
from bi_patch.seams.overlay import Overlay, with_globals


def _configs(original):
    """get_moe_configs: return tuned tiles by the number of tokens, from bi_patch's tables or stock vLLM's."""
    import vllm.envs as envs

    from bi_patch.ops.cuda import moe

    stock = with_globals(original.__wrapped__, envs=Overlay(envs, VLLM_BATCH_INVARIANT=False))

    @functools.cache
    def tuned(E, N, dtype, block_n, block_k):
        table = moe.bundled_table(E, N, dtype, block_k or 0) or stock(E, N, dtype, block_n, block_k)
        return table and {m: moe.one_pass(tile, dtype, block_k or 0) for m, tile in table.items()}

    def get_moe_configs(E, N, dtype, block_n=None, block_k=None):
        return None if moe.is_fixed(E, N, dtype) else tuned(E, N, dtype, block_n, block_k)

    return get_moe_configs


def _default(original):
    """get_default_config: return stock vLLM's default tiles for sizes without a table, but never split K."""
    import vllm.envs as envs

    from bi_patch.ops.cuda import moe

    stock = with_globals(original, envs=Overlay(envs, VLLM_BATCH_INVARIANT=False))

    @functools.wraps(original)
    def get_default_config(M, E, N, K, topk, dtype, block_shape=None):
        group = block_shape[1] if dtype == moe.FP8 and block_shape else 0
        if moe.is_fixed(E, N, dtype):
            return dict(moe.FIXED_GROUPS) if group else original(M, E, N, K, topk, dtype, block_shape)
        tile = stock(M, E, N, K, topk, dtype, block_shape)
        return moe.one_pass(moe.tuned(tile, M * topk / E, dtype, group), dtype, group)

    return get_default_config


def _blocks(original):
    """invoke_fused_moe_triton_kernel: a bundled kernel for experts in FP8 blocks on Hopper."""
    by_tile = original.__globals__["enable_swap_ab"]
    names = tuple(inspect.signature(original).parameters)

    @functools.wraps(original)
    def invoke_fused_moe_triton_kernel(*given, **named):
        from bi_patch.kernels.triton import block_experts
        from bi_patch.ops.cuda import machine

        a = dict(zip(names, given, strict=False), **named)  # binding the signature would take the host longer
        if list(a.get("block_shape") or ()) != [_GROUP, _GROUP] or not a["use_fp8_w8a8"] or not machine.is_hopper():
            return original(*given, **named)
        if a.get("B_bias") is not None:
            raise UnsupportedFeature(
                "moe.cuda_blocks: experts in FP8 blocks have no certified order with a bias. Use another checkpoint, "
                "or set BI_PATCH=0"
            )
        block_experts.products(
            a["A"],
            a["B"],
            a["C"],
            a["A_scale"],
            a["B_scale"],
            a["topk_weights"] if a["mul_routed_weight"] else None,
            a["sorted_token_ids"],
            a["expert_ids"],
            a["num_tokens_post_padded"],
            a["top_k"],
            a["config"],
            by_tile(a["config"]["BLOCK_SIZE_M"], a["config"]["BLOCK_SIZE_N"]),
        )

    return invoke_fused_moe_triton_kernel


def _gate(original):
    """GateLinear.__init__: turn off the gate's special kernels, so that it takes a linear layer's route."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        # set_out_dtype may turn the other kernels on again only while the first flag is set.
        for kernel in ("specialized", "dsv3", "fp32", "bf16x3"):
            setattr(self, f"allow_{kernel}_router_gemm", False)
        self.allow_ll_bf16_gemm = False

    return __init__


def _grouped(original):
    """grouped_topk: run it eagerly, so that its softmax and sum are PyTorch's operations, which have one order."""
    return inspect.unwrap(original)  # the function itself if torch.compile is off


def _routed(original):
    """MoERunner._maybe_apply_routed_scale_to_output: multiply by an operator, which rounds in compiled code, too."""
    import torch

    from bi_patch.ops.cuda import routed

    routed.define_op()

    def _maybe_apply_routed_scale_to_output(self, shared_output, fused_output):
        factor = self.routed_scaling_factor
        if factor == 1.0:
            return shared_output, fused_output
        if fused_output.dtype != torch.float16 or shared_output is None:
            return shared_output, routed.scale(fused_output, factor)
        return routed.scale(shared_output, 1.0 / factor), fused_output  # the decoder layer divides the rest

    return _maybe_apply_routed_scale_to_output


def experts(model):
    """Each kind of Triton experts in a model, with vLLM's kernel and its choice of tiles for this kind."""
    from vllm.model_executor.layers.fused_moe import fused_moe, override_config

    from bi_patch.ops.cuda.moe import Kernel, Problem
    from bi_patch.seams.cuda import packed_experts

    for module in model.modules():
        if packed_experts.covers(module):
            continue  # a row certificate has them
        w13, w2 = getattr(module, "w13_weight", None), getattr(module, "w2_weight", None)
        if w13 is None or w2 is None or w13.ndim != 3 or not w13.is_cuda:
            continue
        config = getattr(module, "moe_config", None)
        top_k = getattr(module, "top_k", None) or config.experts_per_token
        if w2.shape[0] < top_k:
            raise UnsupportedFeature(
                f"moe.cuda_experts: a rank holds {w2.shape[0]} experts, and a token chooses {top_k}. Use fewer ranks, "
                "or leave --enable-expert-parallel out"
            )
        activation = getattr(config, "activation", None) or module.activation
        bias = getattr(module, "w13_bias", None) is not None
        weighted = bool(getattr(module, "apply_router_weight_on_input", False))
        group, scale = (0, "") if w13.dtype in _plain() else _scales(module)
        dtype = config.in_dtype if group or scale else w2.dtype
        problem = Problem(
            w2.shape[0], w2.shape[2], w2.shape[1], top_k, dtype, activation.value, bias, weighted, group, scale
        )
        block = {"block_shape": [group, group]} if group else {}
        choose = functools.partial(
            fused_moe.try_get_optimal_moe_config, w13.shape, w2.shape, top_k, problem.table[2], **block
        )
        yield problem, Kernel(_run(fused_moe.fused_experts, activation, problem), choose, override_config)


def _plain():
    import torch

    return torch.bfloat16, torch.float16, torch.float32


def _scales(module) -> tuple[int, str]:
    """The group and the scale of moe.Problem for quantized experts. Raises UnsupportedFeature for uncovered ones."""
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    block, name = getattr(experts, "block_shape", None), type(experts).__name__
    if name == "TritonExperts" and module.w13_weight.element_size() == 1 and module.w13_weight.is_floating_point():
        biased = getattr(module, "w13_bias", None) is not None
        if list(block or ()) == [_GROUP, _GROUP] and not biased:
            return _GROUP, ""
        if block is None and not biased and (scale := _scale(module, experts)):
            return 0, scale
    raise UnsupportedFeature(
        f"moe.cuda_quantized: bi_patch has no certified order for experts of {name} with {module.w13_weight.dtype} "
        f"weights{f' in blocks of {list(block)}' if block else ''}. Leave out --moe-backend, use another checkpoint, "
        "or set BI_PATCH=0"
    )


def _scale(module, experts) -> str:
    """The scale of moe.Problem for experts without blocks, "" for uncovered ones. experts: vLLM's kernel."""
    from bi_patch.ops.cuda.moe import EXPERT, EXPERT_AND_ROW, ROW

    held = ((experts.w1_scale, module.w13_weight), (experts.w2_scale, module.w2_weight))
    each = all(scale.shape == weight.shape[:1] for scale, weight in held)
    if experts.per_act_token_quant:
        by_row = all(scale.shape == (*weight.shape[:2], 1) for scale, weight in held)
        return ROW if by_row else EXPERT_AND_ROW if each else ""
    fixed = all(scale is not None and scale.numel() == 1 for scale in (experts.a1_scale, experts.a2_scale))
    return EXPERT if each and fixed else ""


_GROUP = 128
_ACTIVATIONS_BY = 0.02  # the scale of activations of EXPERT: random rows fit into e4m3


def _run(fused_experts, activation, problem):
    """fused_experts for one kind of experts. A bias is zero, because a large one would hide how the sums round."""
    from bi_patch.ops.cuda.moe import EXPERT, EXPERT_AND_ROW, ROW

    def run(x, w13, w2, weights, ids):
        from vllm.model_executor.layers.fused_moe.config import (
            FUSED_MOE_UNQUANTIZED_CONFIG,
            biased_moe_quant_config,
            fp8_w8a8_moe_quant_config,
        )

        held = FUSED_MOE_UNQUANTIZED_CONFIG
        if problem.eighth:
            (w13, w13_scale), (w2, w2_scale) = w13, w2
            by_row = problem.scale in (ROW, EXPERT_AND_ROW)
            rows = x.new_full((1,), _ACTIVATIONS_BY, dtype=w13_scale.dtype) if problem.scale == EXPERT else None
            held = fp8_w8a8_moe_quant_config(
                w1_scale=w13_scale,
                w2_scale=w2_scale,
                a1_scale=rows,
                a2_scale=rows,
                per_act_token_quant=by_row,
                per_out_ch_quant=problem.scale == ROW,
                block_shape=[problem.group, problem.group] if problem.group else None,
            )
        if problem.bias:
            held = biased_moe_quant_config(*(w.new_zeros(w.shape[:2]) for w in (w13, w2)))
        return fused_experts(
            x,
            w13,
            w2,
            weights,
            ids,
            activation=activation,
            apply_router_weight_on_input=problem.weighted_input,
            quant_config=held,
        )

    return run


_FUSED_MOE = "vllm.model_executor.layers.fused_moe.fused_moe"
_TRITON_EXPERTS = "vllm.model_executor.layers.fused_moe.experts.triton_moe"


SEAMS = (
    Seam(
        name="moe.cuda_tables",
        targets=(Target(_FUSED_MOE, "get_moe_configs"),),
        close=_configs,
        why="upstream's mode forces one untuned tile for every batch, which takes up to twice the time in a decode "
        "step",
        how="experts use tiles tuned for the number of tokens, from vLLM's tables or bi_patch's, and never split K",
        until="upstream's mode keeps tuned tiles (https://github.com/vllm-project/vllm/issues/27433)",
        causes=(10,),
        serves=("FusedMoE", "MoERunner", "RoutedExperts", "FusedMoEExperts"),
    ),
    Seam(
        name="moe.cuda_default",
        targets=(Target(_FUSED_MOE, "get_default_config"),),
        close=_default,
        why="upstream's mode forces one untuned tile for every batch",
        how="experts without a table use stock vLLM's default tiles for the number of tokens, or for FP8 on Hopper "
        "faster ones, and never split K",
        until="upstream's mode keeps tuned tiles (https://github.com/vllm-project/vllm/issues/27433)",
        causes=(10,),
    ),
    Seam(
        name="moe.cuda_blocks",
        targets=(Target(_FUSED_MOE, "invoke_fused_moe_triton_kernel", ">=0.33", (_TRITON_EXPERTS,)),),
        close=_blocks,
        why="for few rows vLLM swaps the operands of experts in FP8 blocks, which multiplies a sum by its two scales "
        "in another order",
        how="on Hopper a bundled kernel multiplies the two scales first, in every tile. Other FP8 experts multiply by "
        "the scales in one order",
        until="upstream's kernel multiplies by the scales in one order",
        causes=(12,),
    ),
    Seam(
        name="moe.cuda_routed",
        targets=(
            Target(
                "vllm.model_executor.layers.fused_moe.runner.moe_runner",
                "MoERunner._maybe_apply_routed_scale_to_output",
                ">=0.26",
            ),
        ),
        close=_routed,
        why="compiled code multiplies the routed experts' output by a factor, and adds the shared experts' output, "
        "without the rounding of eager code in between",
        how="the factor is applied by an operator, which rounds",
        until="upstream's compiled and eager code round at the same places",
        causes=(17,),
        op="bi_patch.ops.cuda.routed",
    ),
    Seam(
        name="moe.cuda_gate",
        targets=(Target("vllm.model_executor.layers.fused_moe.router.gate_linear", "GateLinear.__init__", "<0.33"),),
        close=_gate,
        why="special router kernels serve up to 16 or 32 tokens and sum in another order than the kernel for more "
        "tokens",
        how="bi_patch turns these kernels off, so every gate is a linear layer with a certified route",
        until="bi_patch no longer supports vLLM 0.32. In vLLM 0.33, upstream's mode turns these kernels off",
        causes=(1, 13),
    ),
    Seam(
        name="moe.cuda_grouped_topk",
        targets=(Target("vllm.model_executor.layers.fused_moe.router.grouped_topk_router", "grouped_topk"),),
        close=_grouped,
        why="torch.compile makes one kernel for a single token and another for several, and the two sum the softmax "
        "over experts in different orders",
        how="the router calls PyTorch's operations one by one, each in one order. Routers with a correction bias run "
        "on one fused kernel of vLLM",
        until="upstream's fused kernel also serves routers without a bias",
        causes=(13, 17),
    ),
)
