"""Seams of RMSNorm, LayerNorm and their kin: each row is reduced alone and in one order."""

import functools

from bi_patch.seams.model import Seam, Target


def _register(original):
    """A norm's __init__ on CPU: the layer is kept on a list and its row order certified once the model is loaded."""

    @functools.wraps(original)
    def __init__(self, hidden_size, *args, **kwargs):
        from bi_patch.ops.cpu import rows

        original(self, hidden_size, *args, **kwargs)
        rows.register_norm(self, hidden_size)

    return __init__


def _rms(original):
    """RMSNorm.forward_native, which CPU takes compiled or not: the bundled kernel."""
    from bi_patch.ops.cpu import machine, norm

    def forward_native(self, x, residual=None):
        held = self.weight.data if self.has_weight else None
        if self.variance_size_override is not None or not machine.covers(x, held):
            return original(self, x, residual)
        return norm.rms_norm(x, held, self.variance_epsilon, residual)

    return forward_native


def _gemma(original):
    """GemmaRMSNorm.forward_native: the same kernel, times (1 + weight)."""
    from bi_patch.ops.cpu import machine, norm

    def forward_native(self, x, residual=None):
        if not machine.covers(x, self.weight.data):
            return original(self, x, residual)
        return norm.rms_norm(x, self.weight.data, self.variance_epsilon, residual, 1.0)

    return forward_native


def _norm(name: str, qualname: str, close, serves: tuple[str, ...] = ()) -> Seam:
    return Seam(
        name=f"norm.cpu_{name}",
        targets=(Target("vllm.model_executor.layers.layernorm", qualname),),
        close=close,
        why="compiled code sums a row in other places than eager code, which runs six operations for one norm",
        how="one bundled kernel, with and without residual, compiled or not",
        until="upstream's norms state one order for compiled and eager code",
        causes=(2, 17),
        serves=serves,
    )


def _certified(name: str, qualname: str, serves: tuple[str, ...] = ()) -> Seam:
    return Seam(
        name=f"norm.cpu_{name}_certified",
        targets=(Target("vllm.model_executor.layers.layernorm", f"{qualname}.__init__"),),
        close=_register,
        why="a reduction whose blocks follow the number of rows changes bits with the batch",
        how="the row order of whichever kernel serves the layer is certified, with and without residual",
        until="upstream states one order for its CPU norms",
        causes=(2,),
        serves=serves,
    )


SEAMS = (
    _norm("rms", "RMSNorm.forward_native", _rms, ("RMSNorm", "GemmaRMSNorm")),
    _norm("gemma_rms", "GemmaRMSNorm.forward_native", _gemma),
    _certified("rms", "RMSNorm"),
    _certified("gemma_rms", "GemmaRMSNorm"),
    _certified("layer", "LayerNorm", ("LayerNorm",)),
)
