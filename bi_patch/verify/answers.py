"""What is asked of an engine and what it answers, and the bitwise comparison of two answers."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence

import msgspec


class Request(msgspec.Struct, frozen=True):
    """One request. Greedy unless temperature > 0; a sampled one needs a seed, or nothing can be compared.

    prompt: token ids. logprobs, prompt_logprobs: how many top alternatives besides the chosen token, None for none
    at all (a request with prompt_logprobs bypasses vLLM's prefix cache). delay: engine steps before it arrives.
    top_k: 0 for all. lora: folder of a LoRA adapter, "" for none. digest: whether full rows of logits are digested
    (an engine whose Options say digests).
    """

    prompt: tuple[int, ...]
    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = 0
    prompt_logprobs: int | None = None
    delay: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    lora: str = ""
    digest: bool = False

    def but(self, **changes: object) -> Request:
        return msgspec.structs.replace(self, **changes)


class Answer(msgspec.Struct, frozen=True):
    """What came back. Equality (==) is bitwise on ids and floats.

    tokens: generated ids; logprobs: natural log of the chosen token's probability, one per generated token.
    top: per generated token the (id, logprob) pairs in vLLM's order. prompt_logprobs, prompt_top: the same for
    prompt positions 1 .. len(prompt) - 1; empty when not asked for. digests: per generated token a hash of the bytes
    of its whole row of logits, over the full vocabulary; empty when not asked for.
    """

    tokens: list[int]
    logprobs: list[float] = []
    top: list[list[tuple[int, float]]] = []
    prompt_logprobs: list[float] = []
    prompt_top: list[list[tuple[int, float]]] = []
    text: str = ""
    digests: list[str] = []


class Difference(msgspec.Struct, frozen=True):
    """Counts of compared positions (generated and prompt), and where two answers part.

    differing: positions where the token, its logprob, a top logprob or the logits' digest is not bitwise the same.
    tokens_changed: positions with another token. largest, ulps: the greatest |difference| of logprobs, and the greatest
    distance in steps of float32, at positions up to the first changed token (later ones belong to different texts).
    first: words for the first differing position. generated, prompt: the differing positions, counted from 0 in the
    generated tokens and in the prompt. digests: rows of logits compared by their digest.
    """

    compared: int = 0
    differing: int = 0
    tokens_changed: int = 0
    largest: float = 0.0
    first: str = ""
    ulps: int = 0
    generated: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    digests: int = 0

    def __add__(self, other: Difference) -> Difference:
        return Difference(
            self.compared + other.compared,
            self.differing + other.differing,
            self.tokens_changed + other.tokens_changed,
            max(self.largest, other.largest),
            self.first or other.first,
            max(self.ulps, other.ulps),
            self.generated + other.generated,
            self.prompt + other.prompt,
            self.digests + other.digests,
        )


def compare(expected: Answer, got: Answer, label: str = "") -> Difference:
    """Compare two answers to the same request, position by position, bitwise."""
    return _compare_prompt(expected, got, label) + _compare_generated(expected, got, label)


def compare_all(expected: Sequence[Answer], got: Sequence[Answer], labels: Iterable[str]) -> Difference:
    """The sum over pairs of answers. Raises ValueError when the lengths differ."""
    return sum(
        (compare(e, g, label) for e, g, label in zip(expected, got, labels, strict=True)), start=Difference()
    )


def same(a: float, b: float) -> bool:
    """Bitwise equal, with any NaN equal to any other and -0.0 not equal to 0.0."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return a == b and math.copysign(1.0, a) == math.copysign(1.0, b)


def _same_top(a: list[tuple[int, float]], b: list[tuple[int, float]]) -> bool:
    return len(a) == len(b) and all(x[0] == y[0] and same(x[1], y[1]) for x, y in zip(a, b))


def ulps(a: float, b: float) -> int:
    """How many float32 values lie between a and b, the last one counted; 0 for the same bits or where one is NaN."""
    if same(a, b) or math.isnan(a) or math.isnan(b):
        return 0
    return abs(_rank(a) - _rank(b))


def _rank(value: float) -> int:
    """The place of a float32 among all of them in ascending order, -0.0 just under 0.0."""
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF) - 1


def _compare_prompt(expected: Answer, got: Answer, label: str) -> Difference:
    pairs = list(zip(expected.prompt_logprobs, got.prompt_logprobs, strict=True))
    tops = list(zip(expected.prompt_top, got.prompt_top, strict=True))
    wrong = [i for i, ((a, b), (t, u)) in enumerate(zip(pairs, tops)) if not (same(a, b) and _same_top(t, u))]
    first = ""
    if wrong:
        i = wrong[0]
        first = f"{label}: prompt position {i + 1}: ".lstrip(": ") + _words(pairs[i], tops[i])
    every = pairs + [p for t, u in tops for p in _shared(t, u)]
    return Difference(
        len(pairs), len(wrong), 0, _largest(every), first, _ulps(every), prompt=tuple(i + 1 for i in wrong)
    )


def _compare_generated(expected: Answer, got: Answer, label: str) -> Difference:
    count = max(len(expected.tokens), len(got.tokens))
    parted = next((i for i in range(count) if _at(expected.tokens, i) != _at(got.tokens, i)), count)
    wrong = [
        i
        for i in range(count)
        if _at(expected.tokens, i) != _at(got.tokens, i)
        or not same(_at(expected.logprobs, i, 0.0), _at(got.logprobs, i, 0.0))
        or not _same_top(_at(expected.top, i, []), _at(got.top, i, []))
        or _at(expected.digests, i) != _at(got.digests, i)
    ]
    first = ""
    if wrong:
        i = wrong[0]
        pair = (_at(expected.logprobs, i, 0.0), _at(got.logprobs, i, 0.0))
        first = f"{label}: generated position {i}: ".lstrip(": ") + (
            f"token {_at(expected.tokens, i)} became {_at(got.tokens, i)}"
            if i == parted
            else _words(pair, (_at(expected.top, i, []), _at(got.top, i, [])))
        )
    changed = sum(_at(expected.tokens, i) != _at(got.tokens, i) for i in range(count))
    pairs = list(zip(expected.logprobs[:parted], got.logprobs[:parted]))
    # The first changed token still follows the same text: what both say of each token there can be compared.
    for t, u in zip(expected.top[: parted + 1], got.top[: parted + 1]):
        pairs += _shared(t, u)
    return Difference(
        count, len(wrong), changed, _largest(pairs), first, _ulps(pairs), generated=tuple(wrong),
        digests=min(len(expected.digests), len(got.digests)),
    )


def _words(pair: tuple[float, float], tops: tuple[list, list]) -> str:
    """How one position differs, its token being the same."""
    if not same(*pair):
        return f"logprob {pair[0]!r} became {pair[1]!r}"
    if not _same_top(*tops):
        return "a top logprob, or the order of the top tokens, changed"
    return "the row of logits changed"


def _shared(a: list[tuple[int, float]], b: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """The logprobs of the tokens that both name."""
    other = dict(b)
    return [(value, other[token]) for token, value in a if token in other]


def _largest(pairs: Iterable[tuple[float, float]]) -> float:
    return max((abs(a - b) for a, b in pairs if not same(a, b)), default=0.0)


def _ulps(pairs: Iterable[tuple[float, float]]) -> int:
    return max((ulps(a, b) for a, b in pairs), default=0)


def _at(items: list, index: int, default: object = None):
    return items[index] if index < len(items) else default
