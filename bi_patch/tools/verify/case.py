"""One compared pair: a request, the two scenarios it was answered in, both answers and where they part.

A Case holds what is needed to run the pair again. For each of its two scenarios:

    engine = start(options.but(**scenario.options), fresh=scenario.fresh)
    engine.reset_cache()
    for batch in scenario.warmup:
        engine.generate(batch)                       # leaves its prefixes in the cache
    answer = engine.generate(scenario.requests)[scenario.index]

`bi_patch.tools.verify.locate.locate(case, options, start)` looks for the first operation that differs and returns a
`Located`, or None when the pair does not differ again.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from bi_patch.tools.verify.answers import Answer, Difference, Request, compare


class Scenario(msgspec.Struct, frozen=True):
    """The company and the engine in which one request was answered.

    requests: all that run together, the request itself at `index`. warmup: batches run before, in order, on the same
    cache, which was empty before the first. options: changes to the engine's base Options. fresh: in a new process
    whose compile caches are empty. chunk: a budget of tokens per engine
    step set on the running engine, None for the engine's own.
    """

    requests: list[Request]
    index: int = 0
    warmup: list[list[Request]] = []
    options: dict[str, object] = {}
    fresh: bool = False
    chunk: int | None = None

    @property
    def request(self) -> Request:
        return self.requests[self.index]

    @staticmethod
    def alone(request: Request, **changes: object) -> Scenario:
        """The request by itself, at once, on an empty cache."""
        return Scenario([request.but(delay=0)], 0, **changes)

    @staticmethod
    def among(before: Sequence[Request], request: Request, after: Sequence[Request], **changes: object) -> Scenario:
        """The request between others."""
        return Scenario([*before, request, *after], len(before), **changes)


class Case(msgspec.Struct, frozen=True):
    """The answers to one request in two scenarios. `alone` gave `expected`, `company` gave `got`.

    axis: the probe's name. label: words for the pair, e.g. "prompt of 37 tokens in a batch of 16".
    part: "" when whole answers are compared; "decode" when the tokens generated in `alone` stand at the end of the
    prompt in `company`, so that `expected` holds decode logprobs and `got` the prompt logprobs of the same tokens.
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
        """Whether rows of logits were asked for on both sides; a prompt's rows have no digests."""
        return self.alone.request.digest and self.company.request.digest and not self.part

    @staticmethod
    def of(
        axis: str, label: str, alone: Scenario, company: Scenario, expected: Answer, got: Answer, part: str = ""
    ) -> Case:
        """Compare the answers now."""
        return Case(axis, label, alone, company, expected, got, compare(expected, got, label), part)
