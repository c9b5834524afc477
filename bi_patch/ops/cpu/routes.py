"""Which routes serve the linear layers of a model on CPU, for the line of an armed engine."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from bi_patch.ops.cpu import linear, machine, quantized

if TYPE_CHECKING:
    import torch


def counts(model: torch.nn.Module) -> dict[str, int]:
    """A loaded model's linear layers by route, e.g. {"bundled amx_bf16": 5, "library or bundled amx_bf16": 2}.

    The bundled GEMM is named with its instruction set. "library or bundled ...": vLLM's kernel serves the numbers of
    rows where its certificate passed and it is faster, the bundled GEMM all others. "library": vLLM's quantized kernel
    serves every number of rows, as its certificate allows.
    """
    bundled = f"bundled {machine.instruction_set()}"
    found: Counter[str] = Counter()
    for route in linear.routes(model):
        found[f"library or {bundled}" if route.vendor_rows else bundled] += 1
    for route in quantized.routes(model):
        found["library" if route.rows else bundled] += 1
    return dict(sorted(found.items()))
