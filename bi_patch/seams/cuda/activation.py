"""Gated activations: compiled and eager code must round once, at the same place."""

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Policy, Seam, Target


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


def _silu(original):
    """SiluAndMul.forward_cuda: call the bundled kernel for rows of 16-bit elements."""
    from bi_patch.ops.cuda import activation

    activation.define_op()

    def forward_cuda(self, x):
        if x.ndim != 2 or not activation.covers(x.shape[1] // 2, x.dtype):
            return original(self, x)
        return activation.scaled_silu_and_mul(x)

    return forward_cuda


def forms(model, config):
    """The form and the type of each gated activation of a model that a bundled kernel can take."""
    from vllm.model_executor.layers.activation import SiluAndMul

    from bi_patch.ops.cuda import activation
    from bi_patch.seams.cuda.packed_experts import OWNED, kernel

    for module in model.modules():
        if isinstance(module, SiluAndMul):
            yield activation.SILU, config.model_config.dtype
        elif type(kernel(module)).__name__ in OWNED and module.moe_config.activation.value == "swigluoai":
            yield activation.PAIRS, config.model_config.dtype


def _scaled(original):
    """FalconH1MLP.forward: one launch multiplies the gate by its factor, activates it, and multiplies by the rest."""
    from bi_patch.ops.cuda import activation

    activation.define_op()

    def forward(self, x):
        if not activation.covers(self.intermediate_size // self.tp_size, x.dtype):
            return original(self, x)
        x, _ = self.gate_up_proj(x)
        x = activation.scaled_silu_and_mul(x, self.gate_multiplier)
        x, _ = self.down_proj(x)
        return x * self.down_multiplier

    return forward


SEAMS = (
    Seam(
        name="activation.cuda_silu",
        targets=(Target("vllm.model_executor.layers.activation", "SiluAndMul.forward_cuda"),),
        close=_silu,
        why="vLLM's kernel for SwiGLU takes longer than code that torch.compile makes, which rounds in other places",
        how="a bundled kernel with the bits of vLLM's, if its certificate allows that",
        until="vLLM's kernel is as fast as code of torch.compile",
        required=False,
        causes=(17,),
        serves=("SiluAndMul",),
        op="bi_patch.ops.cuda.activation",
    ),
    Seam(
        name="activation.cuda_scaled",
        targets=(Target("vllm.model_executor.models.falcon_h1", "FalconH1MLP.forward", ">=0.33"),),
        close=_scaled,
        why="code that torch.compile makes for both operations rounds in other places than eager code, and two kernels "
        "read and write the gates once more",
        how="one bundled kernel with the roundings and the bits of the two",
        until="upstream's compiled and eager code give equal bits at the same speed",
        required=False,
        causes=(17,),
        op="bi_patch.ops.cuda.activation",
    ),
)

POLICIES = (
    Policy(
        name="activation.cuda_custom_op",
        apply=_custom_op,
        why="code that torch.compile makes for an activation rounds in other places than vLLM's own kernel",
    ),
)
