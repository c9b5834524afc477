"""Seams of RMSNorm, LayerNorm and their kin: each row is reduced alone and in one order."""

import functools

from bi_patch.seams.model import Seam, Target

_CPU_RELEASES = ">=0.32,<0.34"


def _cpu_register(original):
    """A norm's __init__ on CPU: the layer is kept on a list and its row order certified once the model is loaded."""

    @functools.wraps(original)
    def __init__(self, hidden_size, *args, **kwargs):
        from bi_patch.orders import rows

        original(self, hidden_size, *args, **kwargs)
        if isinstance(hidden_size, int):
            rows.register_norm(self, hidden_size)

    return __init__


def _norm(name: str, qualname: str) -> Seam:
    return Seam(
        name=f"norm.cpu_{name}",
        targets=(Target("vllm.model_executor.layers.layernorm", f"{qualname}.__init__", _CPU_RELEASES),),
        close=_cpu_register,
        why="a reduction whose blocks follow the number of rows changes bits with the batch",
        how="the kernel is kept and its row order certified, with and without residual, for the model's sizes",
        until="upstream states one order for its CPU norms",
        platforms=frozenset({"cpu"}),
        causes=(2,),
    )


SEAMS = (_norm("rms", "RMSNorm"), _norm("gemma_rms", "GemmaRMSNorm"), _norm("layer", "LayerNorm"))
