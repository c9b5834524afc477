"""Seams of mixture-of-experts layers."""

import functools
import inspect

from bi_patch.seams.model import Seam, Target
from bi_patch.seams.overlay import Overlay, with_globals


def _configs(original):
    """get_moe_configs: the tuned tiles that stock vLLM uses, by the number of tokens."""
    import vllm.envs as envs

    from bi_patch.ops.cuda import moe

    stock = with_globals(original.__wrapped__, envs=Overlay(envs, VLLM_BATCH_INVARIANT=False))

    @functools.cache
    def tuned(E, N, dtype, block_n, block_k):
        table = moe.bundled_table(E, N, dtype) or stock(E, N, dtype, block_n, block_k)
        return table and {m: moe.one_pass(tile) for m, tile in table.items()}

    def get_moe_configs(E, N, dtype, block_n=None, block_k=None):
        return None if moe.is_fixed(E, N, dtype) else tuned(E, N, dtype, block_n, block_k)

    return get_moe_configs


def _default(original):
    """get_default_config: stock vLLM's tiles for sizes without a table, without split-K."""
    import vllm.envs as envs

    from bi_patch.ops.cuda import moe

    stock = with_globals(original, envs=Overlay(envs, VLLM_BATCH_INVARIANT=False))

    @functools.wraps(original)
    def get_default_config(M, E, N, K, topk, dtype, block_shape=None):
        if moe.is_fixed(E, N, dtype):
            return original(M, E, N, K, topk, dtype, block_shape)
        return moe.one_pass(stock(M, E, N, K, topk, dtype, block_shape))

    return get_default_config


def _gate(original):
    """GateLinear.__init__: the gate takes the linear's route for every number of tokens."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        # The first also says whether set_out_dtype may turn the others on again.
        for kernel in ("specialized", "dsv3", "fp32", "bf16x3"):
            setattr(self, f"allow_{kernel}_router_gemm", False)
        self.allow_ll_bf16_gemm = False

    return __init__


def _grouped(original):
    """grouped_topk: not compiled, so that its softmax and sum are those that have one order."""
    return inspect.unwrap(original)  # as given where torch.compile is off


def experts(model):
    """Each size of unquantized Triton experts in a model, with vLLM's kernel and tile choice for it."""
    from vllm.model_executor.layers.fused_moe import fused_moe, override_config

    from bi_patch.ops.cuda.moe import Kernel, Problem

    for module in model.modules():
        w13, w2 = getattr(module, "w13_weight", None), getattr(module, "w2_weight", None)
        if w13 is None or w2 is None or w13.ndim != 3 or not w13.is_cuda:
            continue
        config = getattr(module, "moe_config", None)
        top_k = getattr(module, "top_k", None) or config.experts_per_token
        problem = Problem(w2.shape[0], w2.shape[2], w2.shape[1], top_k, w2.dtype)
        quantization = problem.table[2]
        choose = functools.partial(fused_moe.try_get_optimal_moe_config, w13.shape, w2.shape, top_k, quantization)
        yield problem, Kernel(fused_moe.fused_experts, choose, override_config)


_FUSED_MOE = "vllm.model_executor.layers.fused_moe.fused_moe"


SEAMS = (
    Seam(
        name="moe.cuda_tables",
        targets=(Target(_FUSED_MOE, "get_moe_configs"),),
        close=_configs,
        why="upstream's mode forces one untuned tile for every batch: up to twice the time of a decode step",
        how="tiles follow the number of tokens, from vLLM's tables or ours, never splitting K",
        until="upstream's mode keeps tuned tiles",
        causes=(10,),
        serves=("FusedMoE", "MoERunner", "RoutedExperts", "FusedMoEExperts"),
    ),
    Seam(
        name="moe.cuda_default",
        targets=(Target(_FUSED_MOE, "get_default_config"),),
        close=_default,
        why="upstream's mode forces one untuned tile for every batch",
        how="stock vLLM's default tiles by the number of tokens, never splitting K",
        until="upstream's mode keeps tuned tiles",
        causes=(10,),
    ),
    Seam(
        name="moe.cuda_gate",
        targets=(Target("vllm.model_executor.layers.fused_moe.router.gate_linear", "GateLinear.__init__", "<0.33"),),
        close=_gate,
        why="router kernels for up to 16 or 32 tokens sum in another order than the one for more",
        how="they are off: every gate is a linear with a certified route",
        until="vLLM 0.33, whose own mode turns them off",
        causes=(1, 13),
    ),
    Seam(
        name="moe.cuda_grouped_topk",
        targets=(Target("vllm.model_executor.layers.fused_moe.router.grouped_topk_router", "grouped_topk"),),
        close=_grouped,
        why="it is compiled apart, for one token and for more: the softmax over experts then sums in two orders",
        how="its operations are called one by one, each in one order; routers with a correction bias have one kernel",
        until="upstream's kernel serves routers without a bias",
        causes=(13, 17),
    ),
)
