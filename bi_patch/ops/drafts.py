"""Checks the drafts of speculative decoding: a draft is accepted while it equals the token that its row drew itself.

A request with d drafts has d + 1 rows: row j follows the request's tokens and its first j drafts. Each row draws its
token as a step without speculation would, so the accepted drafts, and the draw of the first row whose draft differs,
are the tokens of d + 1 such steps, whatever the drafts are.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Checked(NamedTuple):
    """tokens: [requests, most + 1] in the drafts' type, -1 after a request's last new token. counts: int64 [requests],
    the new tokens of each request. rows: int64 [requests, most + 1], the row of each place; any row where tokens are
    -1."""

    tokens: torch.Tensor
    counts: torch.Tensor
    rows: torch.Tensor


def owners(drafts: Sequence[int], device: torch.device) -> torch.Tensor:
    """The request of each row, int64 [rows]. drafts: the number of drafts of each request."""
    import torch

    counts = torch.tensor(drafts, dtype=torch.int64) + 1
    return torch.repeat_interleave(torch.arange(len(drafts)), counts).to(device, non_blocking=True)


def inputs(drafted: torch.Tensor, drafts: Sequence[int]) -> torch.Tensor:
    """The draft that each row follows, integers [rows]; -1 for a request's first row.

    drafted: all drafts, integers [rows - requests], request by request. drafts: the number of drafts of each request.
    """
    import torch

    ends = (torch.tensor(drafts, dtype=torch.int64) + 1).cumsum(0)
    made = drafted.new_full((int(ends[-1]),), -1)
    later = torch.ones(len(made), dtype=torch.bool)
    later[torch.cat((ends.new_zeros(1), ends[:-1]))] = False
    made[later.nonzero().flatten().to(drafted.device, non_blocking=True)] = drafted
    return made


def check(drawn: torch.Tensor, inputs: torch.Tensor, ends: torch.Tensor, most: int) -> Checked:
    """Accept each request's drafts up to the first that is not what the row before it drew.

    drawn: the token of each row, integers [rows], request by request. inputs: the draft that each row follows, integers
    [rows]; -1 is never accepted, and a request's first row has none. ends: integers [requests], the row after each
    request's last. most: the largest number of drafts of a request.
    """
    import torch

    ends = ends.long()
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    places = torch.arange(most + 1, device=drawn.device)
    rows = torch.minimum(starts[:, None] + places, ends[:, None] - 1)
    tokens = drawn[rows].to(inputs.dtype)
    after = rows[:, :most] + 1
    follows = inputs[after.clamp(max=len(inputs) - 1)]
    kept = (after < ends[:, None]) & (follows == tokens[:, :most]) & (follows >= 0)
    counts = kept.long().cumprod(1).sum(1) + 1
    return Checked(tokens.masked_fill(places >= counts[:, None], -1), counts, rows)


class Streams(dict):
    """The generators of the rows: row -> torch.Generator. A request's rows share its generator and draw in order.

    The sampler reads `items` while it draws. The state of each generator before the draw of a row is kept, so that
    `keep` can take back the draws of rows whose token does not count.
    """

    def __init__(self, generators: dict[int, torch.Generator], drafts: Sequence[int]) -> None:
        super().__init__()
        self._of_request = generators
        self._drafts = drafts
        self._before: dict[int, torch.Tensor] = {}
        self._first: list[int] = []
        row = 0
        for request, count in enumerate(drafts):
            self._first.append(row)
            for _ in range(count + 1):
                if request in generators:
                    self[row] = generators[request]
                row += 1

    def items(self) -> ItemsView[int, torch.Generator]:
        return _Drawing(self)

    def drawing(self) -> Iterator[tuple[int, torch.Generator]]:
        """Each row with its generator; the generator's state is kept just before."""
        for row in self:
            self._before[row] = self[row].get_state()
            yield row, self[row]

    def keep(self, counts: Sequence[int]) -> None:
        """Take back the draws of the rows after each request's new tokens. counts: the new tokens of each request."""
        for request, generator in self._of_request.items():
            state = self._before.get(self._first[request] + counts[request])
            if state is not None and counts[request] <= self._drafts[request]:
                generator.set_state(state)


class _Drawing(ItemsView):
    def __iter__(self) -> Iterator[tuple[int, torch.Generator]]:
        return self._mapping.drawing()
