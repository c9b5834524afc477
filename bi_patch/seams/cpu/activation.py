"""Gated activations: compiled and eager code must round once, at the same place."""

from bi_patch.seams.model import Seam, Target


def _silu(original):
    """SiluAndMul.forward_native, which CPU runs in compiled and in eager code: call the bundled kernel."""
    from bi_patch.ops.cpu import activation, machine

    native = original.__func__

    def forward_native(x):
        return activation.silu_and_mul(x) if machine.covers(x) else native(x)

    return staticmethod(forward_native)


def _gelu_and_mul(original):
    """GeluAndMul.forward_native, which CPU runs in compiled and in eager code: call the bundled kernel."""
    from bi_patch.ops.cpu import activation, machine

    def forward_native(self, x):
        if not machine.covers(x):
            return original(self, x)
        return activation.gelu_and_mul(x, self.approximate == "tanh")

    return forward_native


def _gelu(original):
    """NewGELU and FastGELU.forward_native: both are GELU by tanh, which is one operator of PyTorch."""

    def forward_native(self, x):
        from torch.nn.functional import gelu

        return gelu(x, approximate="tanh")

    return forward_native


def _seam(name: str, qualname: str, close, how: str = "one bundled kernel computes in fp32 and rounds once") -> Seam:
    return Seam(
        name=f"activation.cpu_{name}",
        targets=(Target("vllm.model_executor.layers.activation", f"{qualname}.forward_native"),),
        close=close,
        why="compiled code computes another exponential than eager code and rounds in other places. PyTorch computes "
        "the last elements of a tensor by scalar code, which rounds differently",
        how=how,
        until="upstream's compiled and eager code give equal bits, wherever an element lies",
        causes=(17, 26),
    )


_ONE_OPERATOR = "one operator of PyTorch, which the bundled kernels serve, takes the place of nine"

SEAMS = (
    _seam("silu", "SiluAndMul", _silu),
    _seam("gelu_and_mul", "GeluAndMul", _gelu_and_mul),
    _seam("gelu_new", "NewGELU", _gelu, _ONE_OPERATOR),
    _seam("gelu_fast", "FastGELU", _gelu, _ONE_OPERATOR),
)
