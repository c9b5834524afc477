"""Seams of gated activations: one rounding, compiled or not."""

from bi_patch.seams.model import Policy


def _custom_op(config) -> None:
    """vLLM's own kernel for gated activations, compiled or not: compiled code would round in other places."""
    held = config.compilation_config.custom_ops
    for name in ("silu_and_mul", "gelu_and_mul"):
        if "all" not in held and f"-{name}" not in held and f"+{name}" not in held:
            held.append(f"+{name}")


POLICIES = (
    Policy(
        name="activation.cuda_custom_op",
        apply=_custom_op,
        why="compiled and eager activations round in different places",
    ),
)
