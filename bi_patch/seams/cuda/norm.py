"""RMSNorm and its relatives: one kernel reduces each row alone and in one order."""

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


def _norm(name: str, qualname: str, close, **attributed) -> Seam:
    return Seam(
        name=f"norm.cuda_{name}",
        targets=(Target("vllm.model_executor.layers.layernorm", qualname),),
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
)
