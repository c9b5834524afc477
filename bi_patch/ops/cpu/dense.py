"""PyTorch's own linear layers (torch.nn.Linear) by the bundled GEMM, for the heads of pooling models.

PyTorch's product of a head chooses its kernel and its blocks of K by the number of pooled rows. The bundled GEMM has
one order (kernels/cpu/README.md). The layer keeps its parameters; the packed weight is a copy of the loaded weight.
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
