"""PyTorch's own linear layers (torch.nn.Linear) and the patches of image encoders by the bundled GEMM.

PyTorch's product chooses its kernel and its blocks of K by the numbers of rows and threads. The bundled GEMM has one
order (kernels/cpu/README.md). The layer keeps its parameters; the packed weight is a copy of the loaded weight.
"""

from __future__ import annotations

import torch


class Dense(torch.nn.Linear):
    """A torch.nn.Linear whose product is the bundled GEMM's. `take` turns a layer into one."""

    _packed: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] of the weight's dtype -> [..., out_features]."""
        return torch.ops.bi_cpu.gemm(x, self._packed, self.out_features, self.in_features, self.bias)


def take(layer: torch.nn.Linear) -> None:
    """Make a layer, whose weight is loaded, a Dense. The layer stays the same object."""
    layer.__class__ = Dense
    layer.__dict__["_packed"] = torch.ops.bi_cpu.gemm_pack(layer.weight.detach())


def take_patches(layer: torch.nn.Module) -> None:
    """Pack the loaded weight [out, in, (time,) height, width] of a convolution whose windows do not overlap."""
    layer.__dict__["_packed"] = torch.ops.bi_cpu.gemm_pack(layer.weight.detach().reshape(layer.out_channels, -1))


def patches(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """x [images, in, (time,) height, width] -> [images, out, (times,) rows, columns], as vLLM's product of patches.

    None for a layer without `take_patches`, and for pixels of another dtype than the weight.
    """
    packed = layer.__dict__.get("_packed")
    if packed is None or x.dtype != layer.weight.dtype:
        return None
    sizes = layer.kernel_size
    for i, size in enumerate(sizes):
        x = x.unfold(2 + i, size, size)
    places = range(2, 2 + len(sizes))
    cut = x.permute(0, *places, 1, *(i + len(sizes) for i in places))
    grid = cut.shape[: 1 + len(sizes)]
    k = layer.weight[0].numel()
    made = torch.ops.bi_cpu.gemm(cut.reshape(-1, k), packed, layer.out_channels, k, layer.bias)
    return made.view(*grid, layer.out_channels).movedim(-1, 1)


def take_projection(layer: torch.nn.Module, name: str) -> None:
    """Pack a loaded parameter [in, out] by which a layer multiplies rows. name: the parameter's name."""
    layer.__dict__["_packed"] = torch.ops.bi_cpu.gemm_pack(getattr(layer, name).detach().t().contiguous())


def project(layer: torch.nn.Module, x: torch.Tensor, name: str) -> torch.Tensor:
    """x [..., in] by the parameter [in, out] of a layer that `take_projection` took -> [..., out]."""
    size = getattr(layer, name).shape
    return torch.ops.bi_cpu.gemm(x.contiguous(), layer.__dict__["_packed"], size[1], size[0], None)
