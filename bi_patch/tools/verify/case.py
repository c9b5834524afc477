"""One compared pair: a request (the target), the two scenarios that answered it, both answers and where they part.

A Case holds everything that running the pair again needs. For each of its two scenarios:

    engine = start(options.but(**scenario.options), fresh=scenario.fresh)
    engine.reset_cache()
    for batch in scenario.warmup:
        engine.generate(batch)                       # fills the prefix cache
    answer = engine.generate(scenario.requests)[scenario.index]

`bi_patch.tools.verify.locate.locate(case, options, start)` looks for the first operation that differs. It returns a
`Located`, or None when the pair does not differ again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import msgspec

from bi_patch.tools.verify.answers import Answer, Difference, Request, compare


class Update(msgspec.Struct, frozen=True):
    """New weights for a running engine. way: one of verify.updates.WAYS. model: the folder that holds the weights."""

    way: str
    model: str


class Pause(msgspec.Struct, frozen=True):
    """A pause of the engine in the middle of answers. step: the engine step before which it begins. forget: running
    requests lose their keys and values meanwhile, and are computed again."""

    STEPS: ClassVar[int] = 3  # calls for a step in which nothing is computed

    step: int
    forget: bool = False


class Scenario(msgspec.Struct, frozen=True):
    """The batch and the engine that answered the target.

    requests: all requests that run together; the target is at `index`. warmup: batches that run before, in order, on
    the same cache; the cache is empty before the first batch. options: changes to the engine's base Options. fresh: the
    engine runs in a new process whose compile caches are empty. chunk: a budget of tokens per engine step that is set
    on the running engine, None for the engine's own budget. scores: the logprobs mode that is set on the running
    engine, None for the engine's own mode. updates: weights that the running engine gets after the warm-up, in order.
    pause: a pause of the running engine while it makes the answers, None for none.
    """

    requests: list[Request]
    index: int = 0
    warmup: list[list[Request]] = []
    options: dict[str, object] = {}
    fresh: bool = False
    chunk: int | None = None
    scores: str | None = None
    updates: list[Update] = []
    pause: Pause | None = None

    @property
    def request(self) -> Request:
        return self.requests[self.index]

    @staticmethod
    def alone(request: Request, **changes: object) -> Scenario:
        """The target by itself, without delay, on an empty cache."""
        return Scenario([request.but(delay=0)], 0, **changes)

    @staticmethod
    def among(before: Sequence[Request], request: Request, after: Sequence[Request], **changes: object) -> Scenario:
        """The target between other requests."""
        return Scenario([*before, request, *after], len(before), **changes)


class Case(msgspec.Struct, frozen=True):
    """The answers to the target in two scenarios. `alone` gave `expected`, `company` gave `got`.

    axis: the probe's name. label: a description of the pair, e.g. "prompt of 37 tokens in a batch of 16".
    part: "" when whole answers are compared. "decode" when the prompt of `company` ends with the tokens that `alone`
    generated: `expected` then holds decode logprobs, and `got` holds the prompt logprobs of the same tokens.
    """

    axis: str
    label: str
    alone: Scenario
    company: Scenario
    expected: Answer
    got: Answer
    difference: Difference
    part: str = ""

    @property
    def differs(self) -> bool:
        return self.difference.differing > 0

    @property
    def on_one_engine(self) -> bool:
        """Whether both scenarios can run on one engine, one after the other."""
        fresh = self.alone.fresh or self.company.fresh
        return self.alone.options == self.company.options and not fresh

    @property
    def digested(self) -> bool:
        """Whether both sides asked for digests of logits; a prompt's rows have no digests."""
        return self.alone.request.digest and self.company.request.digest and not self.part

    @staticmethod
    def of(
        axis: str, label: str, alone: Scenario, company: Scenario, expected: Answer, got: Answer, part: str = ""
    ) -> Case:
        """Make a Case by comparing the two answers."""
        return Case(axis, label, alone, company, expected, got, compare(expected, got, label), part)
