"""NVFP4 weights on a bundled kernel: `PackedNvFp4LinearKernel`, one of vLLM's kernels for such linear layers.

Some checkpoints ask for activations in NVFP4, too. Hopper has no instruction for them, and vLLM's kernels there leave
activations in 16 bits. So does this kernel: the checkpoint's scales of activations are loaded, and not used.
"""

import functools

from bi_patch.errors import UnsupportedFeature

_BITS, _GROUP = 4, 16


def served() -> bool:
    """Whether the bundled kernel serves layers that are made now: in bf16, on Hopper, which runs enough forms of it."""
    import torch

    from bi_patch.ops.cuda import packed_linear

    return torch.get_default_dtype() == torch.bfloat16 and packed_linear.serves_floats()


# vLLM's backends that leave activations in 16 bits on Hopper. "emulation" rounds them, and the others do not start.
_BACKENDS = ("auto", "humming", "marlin")


def keeps_rows(backend: str) -> bool:
    """Whether activations stay in 16 bits although a checkpoint asks for NVFP4, as in stock vLLM. backend: the value of
    --linear-backend for such layers."""
    return served() and backend in _BACKENDS


@functools.cache
def own() -> type:
    """PackedNvFp4LinearKernel. Activations are bf16."""
    import torch
    from vllm.model_executor.kernels.linear import NvFp4LinearKernel
    from vllm.model_executor.utils import replace_parameter

    from bi_patch.kernels.packing import covers, pack_floats
    from bi_patch.ops.cuda import packed_linear

    packed_linear.define_op()
    product = torch.ops.bi_patch.packed_linear

    class PackedNvFp4LinearKernel(NvFp4LinearKernel):
        @classmethod
        def is_supported(cls, compute_capability=None):
            return True, None

        @classmethod
        def can_implement(cls, config):
            return True, None

        def process_weights_after_loading(self, layer):
            """Pack the checkpoint's floats [N, K / 2], two in a byte, once."""
            held = layer.weight.data
            n, k = held.shape[0], held.shape[1] * 2
            if not covers(n, k, _BITS, _GROUP, True):
                raise UnsupportedFeature(
                    f"linear.cuda_packed: a {type(layer).__name__} of {n} x {k} with NVFP4 weights has no kernel: N "
                    "must be a multiple of 16, K of 128. Use another checkpoint or number of GPUs, or set BI_PATCH=0"
                )
            q = torch.stack((held & 15, held >> 4), -1).view(n, k)
            try:
                packed = pack_floats(q, layer.weight_scale.data, layer.weight_global_scale.data)
            except ValueError as error:
                name = getattr(layer, "prefix", "") or type(layer).__name__
                raise UnsupportedFeature(
                    f"linear.cuda_packed: bi_patch's kernel does not take the NVFP4 weights of {name}: {error}. Use "
                    "another checkpoint, or set BI_PATCH=0"
                ) from error
            replace_parameter(layer, "weight", packed.data)
            replace_parameter(layer, "weight_scale", packed.scale)
            replace_parameter(layer, "weight_global_scale", packed.whole)
            self.bi_patch_sizes = n, k

        def apply_weights(self, layer, x, bias=None):
            """Call the certified route. torch.compile sees one op."""
            whole = layer.weight_global_scale
            return product(x, layer.weight, layer.weight_scale, None, bias, _BITS, _GROUP, whole)

    return PackedNvFp4LinearKernel


def problem(kernel, bias: bool):
    """The Problem of a layer's kernel."""
    import torch

    from bi_patch.ops.cuda.packed_linear import Problem

    return Problem(*kernel.bi_patch_sizes, torch.bfloat16, bias, _BITS, _GROUP, False, True)
