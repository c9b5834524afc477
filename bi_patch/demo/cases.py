"""What the demo runs: rounds of batches around every subject, the same for the stock and the armed engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bi_patch.bench.answers import Request

GREEDY, SEEDED, PROMPT = "greedy", "seeded", "prompt"
CHUNK = 256  # tokens an engine step may hold, so that the longest prompt is computed in several chunks


@dataclass(frozen=True)
class Slot:
    """One request of a batch: the subject's index and the kind of request, or a filler (subject None)."""

    request: Request
    subject: int | None = None
    kind: str = GREEDY


@dataclass(frozen=True)
class Round:
    """One batch. column: the table column it counts for. warm: keep the prefix cache of the round before.

    may_stop: stock vLLM on CPU is known to stop here (seeded sampling of a prompt computed in chunks).
    """

    column: str
    about: str
    slots: tuple[Slot, ...]
    warm: bool = False
    may_stop: bool = False


@dataclass(frozen=True)
class Plan:
    """alone: for each (subject, kind) its request. rounds: what is compared with them. columns in order."""

    names: tuple[str, ...]
    alone: dict[tuple[int, str], Request]
    rounds: tuple[Round, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.column for r in self.rounds))


def kinds(quick: bool) -> tuple[str, ...]:
    return (GREEDY, PROMPT) if quick else (GREEDY, SEEDED, PROMPT)


def make(names: Sequence[str], subjects: Sequence[tuple[int, ...]], fillers: Sequence[tuple[int, ...]], *,
         quick: bool = False, temperature: float = 0.7, top_p: float = 0.95) -> Plan:
    """The rounds for prompts given as token ids. quick: fewer batches, for tests."""
    length = 16 if quick else 32
    alone = {}
    for index, prompt in enumerate(subjects):
        greedy = Request(tuple(prompt), max_tokens=length, logprobs=4)
        alone[index, GREEDY] = greedy
        alone[index, SEEDED] = greedy.but(temperature=temperature, top_p=top_p, seed=100 + index)
        # vLLM does not use the prefix cache for these, so they are asked apart from the greedy ones.
        alone[index, PROMPT] = greedy.but(max_tokens=1, prompt_logprobs=1)
    asked = kinds(quick)
    # A seeded request is asked alone only where stock survives it: the prompt fits into one chunk.
    alone = {key: r for key, r in alone.items() if key[1] in asked}
    everyone = range(len(subjects))
    maker = _Maker(alone, [tuple(f) for f in fillers], length)
    rounds = [Round("alone, cached", f"{names[i]} again, warm cache", maker.of(i, GREEDY), warm=True)
              for i in everyone]
    if not quick:
        rounds += [Round("batch of 2", f"{names[i]} {'after' if i % 2 else 'before'} one other",
                         maker.batch([(i, GREEDY)], 2, place=i % 2)) for i in everyone]
    rounds.append(Round("batch of 5", "five prompts together", maker.batch([(i, GREEDY) for i in everyone][:5], 5)))
    rounds.append(Round("batch of 5", "the others, in reverse order",
                        maker.batch([(i, GREEDY) for i in everyone][::-1][:5], 5)))
    everything = [(i, kind) for i in everyone for kind in (GREEDY, PROMPT)]
    rounds.append(Round("batch of 16", "all prompts among others", maker.batch(everything, 16, shuffle=1)))
    rounds.append(Round("batch of 16", "the same in another order, warm cache",
                        maker.batch(everything, 16, shuffle=2), warm=True))
    if not quick:
        rounds.append(Round("batch of 40", "all prompts among many", maker.batch(everything, 40, shuffle=3)))
        rounds.append(Round("batch of 40", "the same in another order, warm cache",
                            maker.batch(everything, 40, shuffle=4), warm=True))
        short = [i for i in everyone if len(subjects[i]) <= CHUNK // 4]
        rounds.append(Round("seeded", "seeded sampling of short prompts, together",
                            maker.batch([(i, SEEDED) for i in short], len(short))))
        everyone_seeded = [(i, SEEDED) for i in everyone]
        rounds.append(Round("seeded, chunked", "seeded sampling of all prompts in a batch of 40",
                            maker.batch(everyone_seeded, 40, shuffle=5), may_stop=True))
    return Plan(tuple(names), alone, tuple(rounds))


@dataclass(frozen=True)
class _Maker:
    alone: dict[tuple[int, str], Request]
    fillers: list[tuple[int, ...]]
    length: int

    def of(self, index: int, kind: str) -> tuple[Slot, ...]:
        return (Slot(self.alone[index, kind], index, kind),)

    def batch(self, asked: Sequence[tuple[int, str]], size: int, *, place: int = 0, shuffle: int = 0
              ) -> tuple[Slot, ...]:
        """The asked slots from `place` on among fillers up to `size`, or mixed by the seed `shuffle`."""
        slots = [Slot(self.alone[key], *key) for key in asked]
        others = [
            Slot(Request(self.fillers[i % len(self.fillers)], max_tokens=self.length - i % 7))
            for i in range(size - len(slots))
        ]
        mixed = others[:place] + slots + others[place:]
        if shuffle:
            random.Random(shuffle).shuffle(mixed)
        return tuple(mixed)
