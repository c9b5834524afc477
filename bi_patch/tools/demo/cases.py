"""What the demo runs: rounds of batches around every subject, the same for the stock and the armed engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bi_patch.tools.verify.answers import Request

GREEDY, SEEDED, PROMPT = "greedy", "seeded", "prompt"
CHUNK = 256  # tokens an engine step may hold, so that the longest prompts are computed in several chunks


@dataclass(frozen=True)
class Slot:
    """One request of a batch: the subject's index and the kind of request; a filler has subject None."""

    request: Request
    subject: int | None = None
    kind: str = GREEDY


@dataclass(frozen=True)
class Round:
    """One batch. column: the column of the table it counts for; "" for the reference, each prompt alone.

    warm: keep the prefix cache of the rounds before. may_stop: stock vLLM on CPU is known to stop here.
    """

    column: str
    about: str
    slots: tuple[Slot, ...]
    warm: bool = False
    may_stop: bool = False

    @property
    def is_reference(self) -> bool:
        return not self.column


@dataclass(frozen=True)
class Plan:
    """names: how the subjects are called. rounds: in order; a slot's reference comes before what is compared to it."""

    names: tuple[str, ...]
    rounds: tuple[Round, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.column for r in self.rounds if r.column))


def make(
    names: Sequence[str],
    subjects: Sequence[tuple[int, ...]],
    fillers: Sequence[tuple[int, ...]],
    *,
    quick: bool = False,
    temperature: float = 0.7,
    top_p: float = 0.95,
) -> Plan:
    """The rounds for prompts given as token ids. quick: fewer batches, for tests."""
    length = 16 if quick else 24
    build = _Builder(
        [Request(tuple(s), max_tokens=length, logprobs=4) for s in subjects],
        [Request(tuple(f), max_tokens=length) for f in fillers],
        temperature,
        top_p,
    )
    rounds: list[Round] = []
    everyone = range(len(subjects))
    for i in everyone:
        rounds.append(Round("", f"{names[i]}, alone", build.one(i, GREEDY)))
        rounds.append(Round("alone, cached", f"{names[i]}, alone again", build.one(i, GREEDY), warm=True))
        rounds.append(Round("", f"{names[i]}, alone, prompt logprobs", build.one(i, PROMPT)))
    for i in everyone if not quick else ():
        about = f"{names[i]} {'after' if i % 2 else 'before'} one other"
        rounds.append(Round("batch of 2", about, build.batch([(i, GREEDY)], 2, place=i % 2)))
    greedy = [(i, GREEDY) for i in everyone]
    both = greedy + [(i, PROMPT) for i in everyone]
    rounds.append(Round("batch of 5", "five prompts together", build.batch(greedy[:5], 5)))
    rounds.append(Round("batch of 5", "five prompts, in reverse", build.batch(greedy[::-1][:5], 5)))
    for size in (16,) if quick else (16, 40):
        rounds.append(Round(f"batch of {size}", "all prompts among others", build.batch(both, size, shuffle=size)))
        rounds.append(
            Round(
                f"batch of {size}",
                "the same in another order, cached",
                build.batch(both, size, shuffle=size + 1),
                warm=True,
            )
        )
    if not quick:
        rounds += _seeded(build, names, subjects)
    return Plan(tuple(names), tuple(rounds))


def _seeded(build: _Builder, names: Sequence[str], subjects: Sequence[tuple[int, ...]]) -> list[Round]:
    """Seeded sampling: first what fits one chunk; then all, where stock vLLM on CPU cannot rewind a draw and stops."""
    short = [i for i, s in enumerate(subjects) if len(s) <= CHUNK // 4]
    long = [i for i in range(len(subjects)) if i not in short]
    rounds = [Round("", f"{names[i]}, alone, seeded", build.one(i, SEEDED)) for i in short]
    rounds.append(
        Round("seeded", "the short prompts, sampled together", build.batch([(i, SEEDED) for i in short], len(short)))
    )
    rounds += [Round("", f"{names[i]}, alone, seeded", build.one(i, SEEDED), may_stop=True) for i in long]
    everyone = [(i, SEEDED) for i in range(len(subjects))]
    rounds.append(
        Round(
            "seeded, split",
            "all prompts, sampled in a batch of 40",
            build.batch(everyone, 40, shuffle=5),
            may_stop=True,
        )
    )
    return rounds


@dataclass(frozen=True)
class _Builder:
    subjects: list[Request]
    fillers: list[Request]
    temperature: float
    top_p: float

    def ask(self, index: int, kind: str) -> Slot:
        request = self.subjects[index]
        if kind == SEEDED:
            request = request.but(temperature=self.temperature, top_p=self.top_p, seed=100 + index)
        if kind == PROMPT:  # vLLM bypasses the prefix cache for these, so they are asked apart
            request = request.but(max_tokens=1, prompt_logprobs=1)
        return Slot(request, index, kind)

    def one(self, index: int, kind: str) -> tuple[Slot, ...]:
        return (self.ask(index, kind),)

    def batch(
        self, asked: Sequence[tuple[int, str]], size: int, *, place: int = 0, shuffle: int = 0
    ) -> tuple[Slot, ...]:
        """The asked slots from `place` on among fillers up to `size`, or mixed by the seed `shuffle`."""
        slots = [self.ask(*key) for key in asked]
        others = [
            Slot(filler.but(max_tokens=filler.max_tokens - i % 7))
            for i, filler in zip(range(size - len(slots)), self.fillers * 2)
        ]
        mixed = others[:place] + slots + others[place:]
        if shuffle:
            random.Random(shuffle).shuffle(mixed)
        return tuple(mixed)
