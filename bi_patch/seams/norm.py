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
        rows.register_norm(self, hidden_size)

    return __init__


def _cpu_rms(original):
    """RMSNorm.forward_native, which CPU takes compiled or not: the bundled kernel."""
    from bi_patch.orders import cpu

    def forward_native(self, x, residual=None):
        held = self.weight.data if self.has_weight else None
        if self.variance_size_override is not None or not cpu.covers(x, held):
            return original(self, x, residual)
        return cpu.rms_norm(x, held, self.variance_epsilon, residual)

    return forward_native


def _cpu_gemma(original):
    """GemmaRMSNorm.forward_native: the same kernel, times (1 + weight)."""
    from bi_patch.orders import cpu

    def forward_native(self, x, residual=None):
        if not cpu.covers(x, self.weight.data):
            return original(self, x, residual)
        return cpu.rms_norm(x, self.weight.data, self.variance_epsilon, residual, 1.0)

    return forward_native


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


def _cpu_norm(name: str, qualname: str, close) -> Seam:
    return Seam(
        name=f"norm.cpu_{name}",
        targets=(Target("vllm.model_executor.layers.layernorm", qualname, CPU_RELEASES),),
        close=close,
        why="compiled code sums a row in other places than eager code, which runs six operations for one norm",
        how="one bundled kernel, with and without residual, compiled or not",
        until="upstream's norms state one order for compiled and eager code",
        platforms=CPU,
        causes=(2, 17),
    )


def _cpu_certified(name: str, qualname: str) -> Seam:
    return Seam(
        name=f"norm.cpu_{name}_certified",
        targets=(Target("vllm.model_executor.layers.layernorm", f"{qualname}.__init__", CPU_RELEASES),),
        close=_cpu_register,
        why="a reduction whose blocks follow the number of rows changes bits with the batch",
        how="the row order of whichever kernel serves the layer is certified, with and without residual",
        until="upstream states one order for its CPU norms",
        platforms=CPU,
        causes=(2,),
    )


SEAMS = (
    _cpu_norm("rms", "RMSNorm.forward_native", _cpu_rms),
    _cpu_norm("gemma_rms", "GemmaRMSNorm.forward_native", _cpu_gemma),
    _cpu_certified("rms", "RMSNorm"),
    _cpu_certified("gemma_rms", "GemmaRMSNorm"),
    _cpu_certified("layer", "LayerNorm"),
    _cuda_norm("rms", "RMSNorm.forward_cuda", _cuda_rms),
    _cuda_norm("rms_native", "RMSNorm.forward_native", _cuda_rms),
    _cuda_norm("gemma_rms", "GemmaRMSNorm.forward_cuda", _cuda_gemma),
    _cuda_norm("gemma_rms_native", "GemmaRMSNorm.forward_native", _cuda_gemma),
)
