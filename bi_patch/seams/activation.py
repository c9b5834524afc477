"""Seams of gated activations: one rounding, compiled or not."""

from bi_patch.seams.model import CPU, CPU_RELEASES, CUDA, Policy, Seam, Target


def _cpu_silu(original):
    """SiluAndMul.forward_native, which CPU takes compiled or not: the bundled kernel."""
    from bi_patch.orders import cpu

    native = original.__func__

    def forward_native(x):
        return cpu.silu_and_mul(x) if cpu.covers(x) else native(x)

    return staticmethod(forward_native)


def _cuda_custom_op(config) -> None:
    """vLLM's own kernel for gated activations, compiled or not: compiled code would round in other places."""
    held = config.compilation_config.custom_ops
    for name in ("silu_and_mul", "gelu_and_mul"):
        if "all" not in held and f"-{name}" not in held and f"+{name}" not in held:
            held.append(f"+{name}")


SEAMS = (
    Seam(
        name="activation.cpu_silu",
        targets=(Target("vllm.model_executor.layers.activation", "SiluAndMul.forward_native", CPU_RELEASES),),
        close=_cpu_silu,
        why="compiled code computes another exponential than eager code, and rounds in other places",
        how="one bundled kernel: fp32 inside, rounded once",
        until="upstream's compiled and eager code give equal bits",
        platforms=CPU,
        causes=(17,),
    ),
)

POLICIES = (
    Policy(
        name="activation.cuda_custom_op",
        apply=_cuda_custom_op,
        why="compiled and eager activations round in different places",
        platforms=CUDA,
    ),
)
