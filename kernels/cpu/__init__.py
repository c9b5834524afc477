"""CPU kernels, each with a fixed order of every sum: GEMM, paged attention, norms, activation, rotary embedding, experts.

`load(cache_dir)` compiles and registers them as `torch.ops.bi_cpu.*`; README.md tells
their orders, layouts and limits.
"""

from .build import ISAS, KernelBuildError, build, detect_isa, load, runnable_isas

__all__ = ["ISAS", "KernelBuildError", "build", "detect_isa", "load", "runnable_isas"]
