"""CPU kernels: GEMM, paged attention, norms, activations, rotary embedding, choice of experts. Sums have a fixed order.

`load(cache_dir)` compiles the kernels and registers them as `torch.ops.bi_cpu.*`. README.md states their arguments,
orders, layouts and limits.
"""

from .build import ISAS, KernelBuildError, build, detect_isa, load, runnable_isas

__all__ = ["ISAS", "KernelBuildError", "build", "detect_isa", "load", "runnable_isas"]
