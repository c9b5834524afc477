"""The continuations that went another way: both texts, and the first word that differs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from bi_patch.tools.demo.prompts import SUBJECTS
from bi_patch.tools.verify.case import Case


@dataclass(frozen=True)
class Divergence:
    """Two continuations of one prompt.

    prompt: the text that both continue. where: the axis and the pair. word: the index of the first of words() that
    differs. sampled: sampled with a seed, not greedy.
    """

    prompt: str
    where: str
    alone: str
    beside: str
    word: int
    sampled: bool = False

    @property
    def order(self) -> tuple[bool, int]:
        """Greedy texts and early changes say the most."""
        return self.sampled, self.word


def divergences(cases: Iterable[Case]) -> list[Divergence]:
    """The pairs whose generated text changed, in order."""
    return [
        Divergence(
            prompt(case),
            f"{case.axis}: {case.label}",
            case.expected.text,
            case.got.text,
            first_word(case.expected.text, case.got.text),
            case.alone.request.temperature > 0,
        )
        for case in cases
        if case.expected.tokens != case.got.tokens and case.expected.text != case.got.text
    ]


def prompt(case: Case) -> str:
    """The text of the case's prompt, whose name begins the label; "" for a label that names none."""
    return next((s.text for s in SUBJECTS if case.label.startswith(s.name)), "")


def pick(found: Iterable[Divergence], limit: int) -> list[Divergence]:
    """At most `limit`: the clearest change of each prompt first, then others, each pair of texts once."""
    once = list({(d.prompt, d.alone, d.beside): d for d in reversed(list(found))}.values())
    once.sort(key=lambda d: d.order)
    first = {d.prompt: d for d in reversed(once)}
    rest = [d for d in once if d is not first[d.prompt]]
    return [*sorted(first.values(), key=lambda d: d.order), *rest][:limit]


def words(text: str) -> list[str]:
    """A text cut into words, each with the white space before it."""
    return re.findall(r"\s*\S+", text)


def first_word(a: str, b: str) -> int:
    """The index of the first of words(a) that words(b) does not have there."""
    left, right = words(a), words(b)
    for index, (x, y) in enumerate(zip(left, right)):
        if x != y:
            return index
    return min(len(left), len(right))
