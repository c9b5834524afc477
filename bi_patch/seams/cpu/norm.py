"""RMSNorm, LayerNorm and their relatives: each row is reduced alone and in one order."""

import functools

from bi_patch.seams.model import Seam, Target

_MODULE = "vllm.model_executor.layers.layernorm"


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


def _gated(original):
    """RMSNormGated.forward_native: call the bundled kernel, which multiplies by the gate and rounds once."""
    from bi_patch.ops.cpu import machine, norm

    def forward_native(self, x, z=None):
        if z is None or not machine.covers(x, self.weight.data) or z.dtype != x.dtype:
            return original(self, x, z)
        return norm.gated_rms_norm(
            x,
            z,
            self.weight.data,
            self.eps,
            self.group_size or x.shape[-1],
            not self.norm_before_gate,
            self.activation == "sigmoid",
        )

    return forward_native


def _gate_first(original):
    """Mixer2RMSNormGated.forward_native: the same kernel, which multiplies by the gate before it norms.

    A rank has whole groups of columns, or a part of the only group. Each rank then gathers the row, norms all of it,
    and keeps its part, which so has the bits that one rank computes.
    """
    from bi_patch.ops.cpu import machine, norm

    def forward_native(self, x, gate):
        weight = self.weight.data if self.use_rms_norm else None
        if weight is None or not machine.covers(x, weight):
            return original(self, x, gate)
        eps, group = self.variance_epsilon, self.group_size
        if self.n_groups % self.tp_size == 0:
            return norm.gated_rms_norm(x, gate, weight, eps, group, True)
        from torch.nn import functional
        from vllm.distributed import tensor_model_parallel_all_gather as gathered

        own, start = weight.shape[0], weight.shape[0] * self.tp_rank
        x, gate = gathered(x.contiguous(), -1), gathered(gate.contiguous(), -1)
        whole = functional.pad(weight, (start, x.shape[-1] - start - own))
        return norm.gated_rms_norm(x, gate, whole, eps, group, True)[..., start : start + own].contiguous()

    return forward_native


def _norm(name: str, qualname: str, close, serves: tuple[str, ...] = (), module: str = _MODULE) -> Seam:
    return Seam(
        name=f"norm.cpu_{name}",
        targets=(Target(module, qualname),),
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
        targets=(Target(_MODULE, f"{qualname}.__init__"),),
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
    _norm("gated_rms", "RMSNormGated.forward_native", _gated, ("RMSNormGated",)),
    _norm(
        "mixer2",
        "Mixer2RMSNormGated.forward_native",
        _gate_first,
        ("Mixer2RMSNormGated",),
        "vllm.model_executor.layers.mamba.mamba_mixer2",
    ),
    _certified("rms", "RMSNorm"),
    _certified("gemma_rms", "GemmaRMSNorm"),
    _certified("layer", "LayerNorm", ("LayerNorm",)),
)
