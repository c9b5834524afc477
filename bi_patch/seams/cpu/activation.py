"""Gated activations: compiled and eager code must round once, at the same place."""

from bi_patch.seams.model import Seam, Target


def _silu(original):
    """SiluAndMul.forward_native, which CPU runs in compiled and in eager code: call the bundled kernel."""
    from bi_patch.ops.cpu import activation, machine

    native = original.__func__

    def forward_native(x):
        return activation.silu_and_mul(x) if machine.covers(x) else native(x)

    return staticmethod(forward_native)


SEAMS = (
    Seam(
        name="activation.cpu_silu",
        targets=(Target("vllm.model_executor.layers.activation", "SiluAndMul.forward_native"),),
        close=_silu,
        why="compiled code computes another exponential than eager code and rounds in other places",
        how="one bundled kernel computes in fp32 and rounds once",
        until="upstream's compiled and eager code give equal bits",
        causes=(17,),
    ),
)
