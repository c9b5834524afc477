"""Seams of RMSNorm, LayerNorm and their kin: each row is reduced alone and in one order."""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import CPU, CPU_RELEASES, CUDA, Seam, Target


def _cpu_register(original):
    """A norm's __init__ on CPU: the layer is kept on a list and its row order certified once the model is loaded."""

    @functools.wraps(original)
    def __init__(self, hidden_size, *args, **kwargs):
        from bi_patch.orders import rows

        original(self, hidden_size, *args, **kwargs)
        if isinstance(hidden_size, int):
            rows.register_norm(self, hidden_size)

    return __init__


def _cuda_rms(original):
    """RMSNorm.forward_cuda and forward_native: the bundled kernel, compiled or not."""
    from bi_patch.orders import cuda_norm

    cuda_norm.define_ops()

    def forward(self, x, residual=None):
        if self.variance_size_override is not None:
            raise UnsupportedFeature(
                "norm.cuda_rms: no invariant RMSNorm over a part of the hidden size. Set BI_PATCH=0"
            )
        held = self.weight.data if self.has_weight else None
        return cuda_norm.rms_norm(x, held, self.variance_epsilon, residual)

    return forward


def _cuda_gemma(original):
    """GemmaRMSNorm.forward_cuda and forward_native: the same kernel, times (1 + weight)."""
    from bi_patch.orders import cuda_norm

    cuda_norm.define_ops()

    def forward(self, x, residual=None):
        return cuda_norm.rms_norm(x, self.weight.data, self.variance_epsilon, residual, 1.0)

    return forward


def _cuda_norm(name: str, qualname: str, close) -> Seam:
    return Seam(
        name=f"norm.cuda_{name}",
        targets=(Target("vllm.model_executor.layers.layernorm", qualname),),
        close=close,
        why="CUDA kernels choose their block by the number of rows; compiled ones are autotuned anew in each process",
        how="one bundled Triton kernel, with and without residual, whose tile depends on the hidden size alone",
        until="upstream's norms state one order for compiled and eager code",
        platforms=CUDA,
        causes=(2, 17, 18),
    )


def _norm(name: str, qualname: str) -> Seam:
    return Seam(
        name=f"norm.cpu_{name}",
        targets=(Target("vllm.model_executor.layers.layernorm", f"{qualname}.__init__", CPU_RELEASES),),
        close=_cpu_register,
        why="a reduction whose blocks follow the number of rows changes bits with the batch",
        how="the kernel is kept and its row order certified, with and without residual, for the model's sizes",
        until="upstream states one order for its CPU norms",
        platforms=CPU,
        causes=(2,),
    )


SEAMS = (
    _norm("rms", "RMSNorm"),
    _norm("gemma_rms", "GemmaRMSNorm"),
    _norm("layer", "LayerNorm"),
    _cuda_norm("rms", "RMSNorm.forward_cuda", _cuda_rms),
    _cuda_norm("rms_native", "RMSNorm.forward_native", _cuda_rms),
    _cuda_norm("gemma_rms", "GemmaRMSNorm.forward_cuda", _cuda_gemma),
    _cuda_norm("gemma_rms_native", "GemmaRMSNorm.forward_native", _cuda_gemma),
)
