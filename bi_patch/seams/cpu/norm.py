"""RMSNorm, LayerNorm and their relatives: each row is reduced alone and in one order."""

import functools

from bi_patch.seams.model import Seam, Target


def _register(original):
    """__init__ of a norm: note the layer, so that load_model certifies its row order."""

    @functools.wraps(original)
    def __init__(self, hidden_size, *args, **kwargs):
        from bi_patch.ops.cpu import rows

        original(self, hidden_size, *args, **kwargs)
        rows.register_norm(self, hidden_size)

    return __init__


def _rms(original):
    """RMSNorm.forward_native, which CPU runs in compiled and in eager code: call the bundled kernel."""
    from bi_patch.ops.cpu import machine, norm

    def forward_native(self, x, residual=None):
        held = self.weight.data if self.has_weight else None
        if self.variance_size_override is not None or not machine.covers(x, held):
            return original(self, x, residual)
        return norm.rms_norm(x, held, self.variance_epsilon, residual)

    return forward_native


def _gemma(original):
    """GemmaRMSNorm.forward_native: call the same kernel, which multiplies by (1 + weight)."""
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
        why="compiled code sums a row in another order than eager code, which runs six operations for one norm",
        how="one bundled kernel serves compiled and eager code, with and without residual",
        until="upstream's norms have one order in compiled and eager code",
        causes=(2, 17),
        serves=serves,
    )


def _certified(name: str, qualname: str, serves: tuple[str, ...] = ()) -> Seam:
    return Seam(
        name=f"norm.cpu_{name}_certified",
        targets=(Target("vllm.model_executor.layers.layernorm", f"{qualname}.__init__"),),
        close=_register,
        why="if the number of rows decides a reduction's blocks, the batch changes the bits",
        how="bi_patch certifies the row order of the kernel that serves the layer, with and without residual",
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
