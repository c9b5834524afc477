"""Gated activations: compiled and eager code must round once, at the same place."""

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Policy


def _custom_op(config) -> None:
    """Use vLLM's own kernel for gated activations in compiled code, too: Inductor would round in other places."""
    held = config.compilation_config.custom_ops
    for name in ("silu_and_mul", "gelu_and_mul"):
        if f"-{name}" in held:
            raise UnsupportedFeature(
                f"activation.cuda_custom_op: custom_ops has -{name}, and the code that torch.compile makes instead has "
                "no certificate. Leave it out, or set BI_PATCH=0"
            )
        if "all" not in held and f"+{name}" not in held:
            held.append(f"+{name}")


POLICIES = (
    Policy(
        name="activation.cuda_custom_op",
        apply=_custom_op,
        why="code that torch.compile makes for an activation rounds in other places than vLLM's own kernel",
    ),
)
