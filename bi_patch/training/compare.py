"""The comparison of a trainer's logprobs with the sampler's, bit by bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bi_patch.errors import ParityBroken, RoutingDiffers
from bi_patch.training.samples import Batch, Routing


@dataclass(frozen=True)
class Parity:
    """What a comparison found.

    compared, differing: numbers of logprobs. first: row and position of the first that differs, or None. worst: the
    largest difference, in nats. not_comparable: the rows that were left out, each with the reason. routing: of the
    experts, for a model and a sampler that have them; None if there was nothing to compare.
    """

    compared: int
    differing: int
    first: tuple[int, int] | None
    worst: float
    not_comparable: dict[int, str] = field(default_factory=dict)
    routing: Routing | None = None

    @property
    def exact(self) -> bool:
        """Whether something was compared, and every bit and every expert is equal."""
        same = self.routing is None or self.routing.differing == 0
        return self.compared > 0 and self.differing == 0 and same

    def __str__(self) -> str:
        left = f"; {len(self.not_comparable)} rows not comparable" if self.not_comparable else ""
        if self.routing is not None:
            left = f"; {self.routing.differing} of {self.routing.compared} choices of experts differ{left}"
        if not self.differing:
            return f"{self.differing} of {self.compared} logprobs differ{left}"
        row, at = self.first
        return (
            f"{self.differing} of {self.compared} logprobs differ, first in row {row} at position {at}, by up to "
            f"{self.worst:.3g}{left}"
        )


def compare(
    trainer: torch.Tensor, sampled: Batch | torch.Tensor, mask: torch.Tensor | None = None, *, strict: bool = False
) -> Parity:
    """Count the logprobs that differ in any bit.

    trainer: [B, T] fp32, from `logprobs`. sampled: the sampler's Batch, or its logprobs [B, T] fp32 with mask [B, T]
    bool, true where a logprob is to be compared. strict: raise RoutingDiffers if an expert differs, ParityBroken if a
    logprob differs, or if there is nothing to compare. Raises ValueError for tensors of other shapes or dtypes.
    """
    left, routing = {}, None
    if isinstance(sampled, Batch):
        routing = sampled.routing
        if strict and sampled.experts is not None and routing is None:
            raise RoutingDiffers(
                "training.routing: the batch holds the sampler's experts, and nobody compared them. Give the batch "
                "itself to training.logprobs"
            )
        left, mask, sampled = sampled.not_comparable, sampled.sampled, sampled.logprobs
    if trainer.shape != sampled.shape or trainer.dtype != sampled.dtype or sampled.dtype != torch.float32:
        raise ValueError(
            f"cannot compare {trainer.dtype} {tuple(trainer.shape)} with {sampled.dtype} {tuple(sampled.shape)}"
        )
    ours, theirs = trainer.detach().cpu().contiguous(), sampled.cpu().contiguous()
    counts = torch.ones(ours.shape, dtype=torch.bool) if mask is None else mask.cpu().bool()
    unequal = (ours.view(torch.int32) != theirs.view(torch.int32)) & counts
    differing = int(unequal.sum())
    where = unequal.nonzero()[0].tolist() if differing else None
    if where is not None and len(where) == 1:
        where = [0, *where]
    worst = float((ours - theirs)[unequal].abs().max()) if differing else 0.0
    found = Parity(int(counts.sum()), differing, where and (where[0], where[1]), worst, left, routing)
    if strict and routing is not None and routing.differing:
        raise RoutingDiffers(
            f"training.routing: {routing.differing} of {routing.compared} choices of experts differ, first in "
            f"{routing.first}"
        )
    if strict and not found.exact:
        raise ParityBroken(f"training.parity: {found}" if differing else "training.parity: there is nothing to compare")
    return found
