"""Faults of weight updates: what a running engine keeps of the weights that it had before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bi_patch.tools.faults import parts
from bi_patch.tools.faults.base import BOTH, CPU, CUDA, Fault, platform
from bi_patch.tools.verify import layers
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.runner import replaced

AXIS = "weight update"
_LINEAR = {"cpu": "linear.cpu_dispatch", "cuda": "linear.cuda_route"}


def old_head(engine: LocalEngine):
    """The head keeps the packed copy of the weights before: vLLM packs a tied head at the first load only."""
    if platform() == CPU:
        from bi_patch.ops.cpu import linear

        return replaced(linear, "has_route", lambda held: lambda layer: False)
    return old_products(engine, "lm_head")


def old_handle(engine: LocalEngine):
    """Linear layers compute with the weights before, as compiled code does that holds the handle of the first load."""
    return old_products(engine, "")


def old_prefix(engine: LocalEngine):
    """The hash of a prompt's first block does not name the weights, so cached prefixes of old weights are used."""
    from bi_patch.seams import weights

    return replaced(weights, "renew", lambda held: lambda: None)


@contextlib.contextmanager
def old_products(engine: LocalEngine, name: str) -> Iterator[None]:
    """Within this context, linears whose path contains `name` compute with the weights that they have now."""
    kept = {path: layers.weight(layer).clone() for path, layer in layers.linears(engine) if name in path}

    def make(path, layer, own):
        return lambda x, bias: parts.product(x, kept[path], bias, [])

    with parts.each_linear(engine, make, kept.__contains__):
        yield


FAULTS = (
    Fault(
        "head of the weights before",
        31,
        old_head.__doc__,
        AXIS,
        old_head,
        BOTH,
        seam=_LINEAR,
        emulated=(CUDA,),
    ),
    Fault(
        "linears of the weights before",
        31,
        old_handle.__doc__,
        AXIS,
        old_handle,
        BOTH,
        "qkv_proj",
        seam=_LINEAR,
        emulated=BOTH,
    ),
    Fault(
        "prefix of the weights before",
        31,
        old_prefix.__doc__,
        AXIS,
        old_prefix,
        BOTH,
        "attn",
        seam={"cpu": "weights.first_block", "cuda": "weights.first_block"},
    ),
)
