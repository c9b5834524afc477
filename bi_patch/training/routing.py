"""The experts of a trainer beside the sampler's, choice by choice: equal routing is shown, and nothing is replayed."""

from __future__ import annotations

import torch

from bi_patch.errors import RoutingDiffers
from bi_patch.training.samples import Routing


def compare(chosen: list[torch.Tensor], sampled: torch.Tensor, rows: torch.Tensor, layers: list[int]) -> Routing:
    """Count the choices that differ, the order of a token's experts included.

    chosen: of each of `layers`, the trainer's experts [packed rows, k]. sampled: the sampler's [B, T, all layers, k],
    -1 where unknown. rows: the place of each packed row in the flat batch [packed rows] int64. Raises RoutingDiffers
    if the routers did not all run once, or if nothing can be compared.
    """
    flat = sampled.reshape(-1, *sampled.shape[2:])[rows]
    if len(chosen) != len(layers) or any(layer >= flat.shape[1] for layer in layers):
        raise RoutingDiffers(
            f"training.routing: {len(chosen)} choices of experts were seen in the trainer, and {len(layers)} of "
            f"{sampled.shape[2]} layers of the sampler have experts. Compare with a model that is not compiled"
        )
    theirs = flat[:, layers]
    ours = torch.stack(chosen, 1).to(theirs.dtype)
    if ours.shape != theirs.shape:
        raise RoutingDiffers(
            f"training.routing: the trainer chooses {ours.shape[2]} experts for a token, and the sampler "
            f"{theirs.shape[2]}"
        )
    known = theirs >= 0
    unequal = (ours != theirs) & known
    count, differing = int(known.sum()), int(unequal.sum())
    if not count:
        raise RoutingDiffers("training.routing: the sampler returned experts of no token, so nothing was compared")
    if not differing:
        return Routing(count, 0)
    at, layer, _ = unequal.nonzero()[0].tolist()
    row, position = divmod(int(rows[at]), sampled.shape[1])
    pair = [x[at, layer].tolist() for x in (ours, theirs)]
    return Routing(
        count,
        differing,
        f"row {row}, position {position}, layer {layers[layer]}: {pair[0]} in the trainer and {pair[1]} in the sampler",
    )
