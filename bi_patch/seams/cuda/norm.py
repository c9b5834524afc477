"""RMSNorm, LayerNorm and their relatives: one kernel reduces each row alone and in one order."""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Seam, Target


def _rms(original):
    """RMSNorm.forward_cuda and forward_native: call the bundled kernel in compiled and in eager code."""
    from bi_patch.ops.cuda import norm

    norm.define_ops()

    def forward(self, x, residual=None):
        if self.variance_size_override is not None:
            raise UnsupportedFeature(
                "norm.cuda_rms: bi_patch has no RMSNorm over a part of the hidden size. Set BI_PATCH=0"
            )
        held = self.weight.data if self.has_weight else None
        return norm.rms_norm(x, held, self.variance_epsilon, residual)

    return forward


def _gemma(original):
    """GemmaRMSNorm.forward_cuda and forward_native: call the same kernel, which multiplies by (1 + weight)."""
    from bi_patch.ops.cuda import norm

    norm.define_ops()

    def forward(self, x, residual=None):
        return norm.rms_norm(x, self.weight.data, self.variance_epsilon, residual, 1.0)

    return forward


def _layer(original):
    """LayerNorm.forward_cuda and forward_native: call the bundled kernel in compiled and in eager code."""
    from bi_patch.ops.cuda import norm

    norm.define_ops()

    @functools.wraps(original)
    def forward(self, x):
        if norm.covers_layer_norm(x, self.normalized_shape):
            return norm.layer_norm(x, self.weight, self.bias, self.eps)
        return original(self, x)

    return forward


def _queries(original):
    """MiniMaxText01RMSNormTP.forward_qk: call the bundled kernels for the norms over all heads, also of other ranks."""
    from bi_patch.ops.cuda import norm

    norm.define_ops()
    norm.define_rank_ops()

    def forward_qk(q_norm, k_norm, q, k):
        if q_norm.tp_world > 1:
            return over_ranks(q_norm, k_norm, q, k, _added)
        return tuple(norm.rms_norm(x, held.weight, held.variance_epsilon) for x, held in ((q, q_norm), (k, k_norm)))

    return staticmethod(forward_qk)


def over_ranks(q_norm, k_norm, q, k, added):
    """The norms of queries and keys whose heads ranks share. added: fp32 [n] -> its sum over ranks, in rank order."""
    from bi_patch.ops.cuda import norm

    sums = added(norm.square_sums(q, k).flatten()).view(-1, 2)
    return tuple(
        norm.norm_by_sums(x, sums, at, held.weight, held.variance_epsilon, x.shape[-1] * held.tp_world)
        for at, (x, held) in enumerate(((q, q_norm), (k, k_norm)))
    )


def _added(sums):
    """The sum over tensor-parallel ranks (communicator.cuda_sum)."""
    from vllm.distributed.communication_op import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(sums)


def _merged(original):
    """MiniMaxText01RMSNormTP.forward_qkv: split the rows, then the same two norms."""
    forward_qk = _queries(original).__func__

    def forward_qkv(q_norm, k_norm, qkv, q_size, kv_size):
        q, k, v = qkv.split([q_size, kv_size, kv_size], dim=-1)
        return *forward_qk(q_norm, k_norm, q, k), v

    return staticmethod(forward_qkv)


def replace_layer_norms(model) -> None:
    """Give every torch.nn.LayerNorm of a loaded model the bundled kernel, before vLLM compiles the model."""
    from torch import nn

    from bi_patch.ops.cuda import norm

    norm.define_ops()
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = _bundled_layer_norm()


@functools.cache
def _bundled_layer_norm():
    from torch import nn

    from bi_patch.ops.cuda import norm

    class LayerNorm(nn.LayerNorm):
        """torch.nn.LayerNorm on the bundled kernel."""

        def forward(self, x):
            if norm.covers_layer_norm(x, self.normalized_shape):
                return norm.layer_norm(x, self.weight, self.bias, self.eps)
            return super().forward(x)

    return LayerNorm


def _norm(name: str, qualname: str, close, releases: str = "", **attributed) -> Seam:
    return Seam(
        name=f"norm.cuda_{name}",
        targets=(Target("vllm.model_executor.layers.layernorm", qualname, releases),),
        close=close,
        why="the number of rows decides the block of vLLM's CUDA kernels, and Inductor tunes compiled norms anew in "
        "each process",
        how="one bundled Triton kernel serves norms with and without residual, and its tile depends only on the hidden "
        "size",
        until="upstream's norms have one order in compiled and eager code "
        "(https://github.com/vllm-project/vllm/pull/57123)",
        causes=(2, 17, 18),
        **attributed,
    )


SEAMS = (
    _norm("rms", "RMSNorm.forward_cuda", _rms, serves=("RMSNorm", "GemmaRMSNorm"), op="bi_patch.ops.cuda.norm"),
    _norm("rms_native", "RMSNorm.forward_native", _rms),
    _norm("gemma_rms", "GemmaRMSNorm.forward_cuda", _gemma),
    _norm("gemma_rms_native", "GemmaRMSNorm.forward_native", _gemma),
    # Before vLLM 0.32, models use torch.nn.LayerNorm.
    _norm("layer", "LayerNorm.forward_cuda", _layer, ">=0.32", serves=("LayerNorm",), op="bi_patch.ops.cuda.norm"),
    _norm("layer_native", "LayerNorm.forward_native", _layer, ">=0.32"),
    *(
        Seam(
            name=f"norm.cuda_{name}",
            targets=(
                Target("vllm.model_executor.layers.minimax_rms_norm.rms_norm_tp", f"MiniMaxText01RMSNormTP.{method}"),
            ),
            close=close,
            why="compiled code sums the squares of all heads in blocks that Inductor tunes anew in each process. In "
            "vLLM 0.23, and over ranks, an op without a certified order sums",
            how="the bundled Triton kernel norms the queries of all heads, and the keys of all heads. Ranks that share "
            "heads add their sums of squares in rank order, in fp32",
            until="upstream's norm has one order in compiled and eager code",
            causes=(2, 17, 18),
            op="bi_patch.ops.cuda.norm",
        )
        for name, method, close in (("queries", "forward_qk", _queries), ("queries_merged", "forward_qkv", _merged))
    ),
)
