"""What is asked of an engine and what it answers, and the bitwise comparison of two answers."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence

import msgspec

from bi_patch.errors import BiPatchError


class AnswerIncomplete(BiPatchError):
    """An engine left out tokens or logprobs that it was asked for, so nothing could be compared there."""


class Request(msgspec.Struct, frozen=True):
    """One request. Greedy unless temperature > 0; a sampled one needs a seed, or nothing can be compared.

    prompt: token ids. logprobs, prompt_logprobs: how many top alternatives besides the chosen token, None for none
    at all (a request with prompt_logprobs bypasses vLLM's prefix cache). asked: tokens whose logprobs take the place of
    the top ones. delay: engine steps before it arrives. top_k: 0 for all. lora: folder of a LoRA adapter, "" for none.
    digest: whether full rows of logits are digested (an engine whose Options say digests).
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
    asked: tuple[int, ...] = ()

    @property
    def alternatives(self) -> int | None:
        """How many tokens' logprobs besides the chosen one's vLLM is to return, None for none at all."""
        return len(self.asked) or self.logprobs

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
    generated tokens and in the prompt. digests: rows of logits compared by their digest. undefined: positions with NaN
    on both sides, which say nothing and are not among the compared ones.
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
    undefined: int = 0

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
            self.undefined + other.undefined,
        )


def compare(expected: Answer, got: Answer, label: str = "") -> Difference:
    """Compare two answers to the same request, position by position, bitwise."""
    return _compare_prompt(expected, got, label) + _compare_generated(expected, got, label)


def checked(requests: Sequence[Request], answers: Sequence[Answer]) -> list[Answer]:
    """The answers, each with everything that its request asked for. Raises AnswerIncomplete.

    Two engines that leave out the same would agree on nothing.
    """
    if len(requests) != len(answers):
        raise AnswerIncomplete(f"{len(requests)} requests got {len(answers)} answers")
    for request, answer in zip(requests, answers):
        wanted = len(answer.tokens)
        if not wanted and request.max_tokens:
            raise AnswerIncomplete(f"a request for {request.max_tokens} tokens got none")
        if request.logprobs is not None and not len(answer.logprobs) == len(answer.top) == wanted:
            raise AnswerIncomplete(
                f"{wanted} tokens came with {len(answer.logprobs)} logprobs and {len(answer.top)} lists of top tokens: "
                "let the engine return logprobs"
            )
        wanted = len(request.prompt) - 1
        if request.prompt_logprobs is not None and not len(answer.prompt_logprobs) == len(answer.prompt_top) == wanted:
            raise AnswerIncomplete(
                f"a prompt of {wanted + 1} tokens came with {len(answer.prompt_logprobs)} of {wanted} prompt logprobs: "
                "let the engine return prompt logprobs"
            )
    return list(answers)


def same(a: float, b: float) -> bool:
    """Bitwise equal, with any NaN equal to any other and -0.0 not equal to 0.0."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return a == b and math.copysign(1.0, a) == math.copysign(1.0, b)


def _same_top(a: list[tuple[int, float]], b: list[tuple[int, float]]) -> bool:
    return len(a) == len(b) and all(x[0] == y[0] and same(x[1], y[1]) for x, y in zip(a, b))


def _undefined(a: float, b: float, top_a: list[tuple[int, float]], top_b: list[tuple[int, float]]) -> bool:
    """Whether a position whose sides are the same has NaN among its logprobs."""
    return any(math.isnan(value) for value in (a, b, *(v for _, v in top_a), *(v for _, v in top_b)))


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
    settled = set(wrong)
    undefined = sum(_undefined(*pair, *top) for i, (pair, top) in enumerate(zip(pairs, tops)) if i not in settled)
    first = ""
    if wrong:
        i = wrong[0]
        first = f"{label}: prompt position {i + 1}: ".lstrip(": ") + _words(pairs[i], tops[i])
    every = pairs + [p for t, u in tops for p in _shared(t, u)]
    return Difference(
        len(pairs) - undefined,
        len(wrong),
        0,
        _largest(every),
        first,
        _ulps(every),
        prompt=tuple(i + 1 for i in wrong),
        undefined=undefined,
    )


def _compare_generated(expected: Answer, got: Answer, label: str) -> Difference:
    count = max(len(expected.tokens), len(got.tokens))
    parted = next((i for i in range(count) if _at(expected.tokens, i) != _at(got.tokens, i)), count)
    digests = min(len(expected.digests), len(got.digests))
    wrong = [
        i
        for i in range(count)
        if _at(expected.tokens, i) != _at(got.tokens, i)
        or not same(_at(expected.logprobs, i, 0.0), _at(got.logprobs, i, 0.0))
        or not _same_top(_at(expected.top, i, []), _at(got.top, i, []))
        or (digests and _at(expected.digests, i) != _at(got.digests, i))
    ]
    settled = set(wrong)
    undefined = sum(
        _undefined(
            _at(expected.logprobs, i, 0.0), _at(got.logprobs, i, 0.0), _at(expected.top, i, []), _at(got.top, i, [])
        )
        for i in range(count)
        if i not in settled
    )
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
        count - undefined,
        len(wrong),
        changed,
        _largest(pairs),
        first,
        _ulps(pairs),
        generated=tuple(wrong),
        digests=digests,
        undefined=undefined,
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
    gaps = (abs(a - b) for a, b in pairs if not same(a, b))
    return max((gap if gap == gap else math.inf for gap in gaps), default=0.0)  # NaN against a number


def _ulps(pairs: Iterable[tuple[float, float]]) -> int:
    return max((ulps(a, b) for a, b in pairs), default=0)


def _at(items: list, index: int, default: object = None):
    return items[index] if index < len(items) else default
