"""Requests to an engine, the engine's answers, and the bitwise comparison of two answers."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence

import msgspec

from bi_patch.errors import BiPatchError


class AnswerIncomplete(BiPatchError):
    """An engine left out tokens or logprobs that a request asked for, so they cannot be compared."""


class NotComparable(BiPatchError):
    """Weights changed while an engine made an answer, so the answer belongs to no weights and proves nothing."""


class Image(msgspec.Struct, frozen=True):
    """A made image of a request: random pixels in [height, width, 3] bytes. at: the place in the prompt's tokens.

    frames: of a made video, 0 for an image.
    """

    at: int
    seed: int
    width: int
    height: int
    frames: int = 0


class Request(msgspec.Struct, frozen=True):
    """One request. Greedy unless temperature > 0. Two answers to a sampled request are comparable if it has a seed.

    prompt: token ids. logprobs, prompt_logprobs: the number of top alternatives besides the chosen token, None for no
    logprobs (a request with prompt_logprobs bypasses vLLM's prefix cache). asked: token ids whose logprobs replace the
    top alternatives. delay: engine steps before the request arrives. top_k: 0 for all tokens. bias: pairs of a token id
    and a number that is added to its logit. allowed: the only token ids that may be chosen, () for all. lora: the
    folder of a LoRA adapter, "" for none. digest: whether full rows of logits are digested. first: a custom logits
    processor makes this token the answer's first, and the next higher token the next; None for no processor. Both need
    an engine with Options.digests. stop, stop_tokens: strings and token ids that end the answer. abort: engine steps
    after its arrival at which the client gives the request up, 0 for never; the answer to an aborted request has no
    tokens. grammar: vLLM's `structured_outputs` as JSON, "" for none. dimensions, activation: of a request to a pooling
    model: the length of the embedding, and whether the pooler's activation is applied; None for the model's own.
    images: made images and videos in ascending order of their places; `prompt` holds no tokens for them. parts: of a
    streamed input, for each part but the last, its end in `prompt` and how many tokens answer it; `prompt` holds these
    tokens but the last, and the answer is that of the last part. at_once: no part waits for the answer to the part
    before.
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
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    abort: int = 0
    grammar: str = ""
    frequency_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] = ()
    first: int | None = None
    dimensions: int | None = None
    activation: bool | None = None
    images: tuple[Image, ...] = ()
    parts: tuple[tuple[int, int], ...] = ()
    at_once: bool = False

    @property
    def alternatives(self) -> int | None:
        """The number of logprobs that vLLM returns besides the chosen token's, None for no logprobs."""
        return len(self.asked) or self.logprobs

    def but(self, **changes: object) -> Request:
        return msgspec.structs.replace(self, **changes)


class Answer(msgspec.Struct, frozen=True):
    """The answer to one request. `compare` and `same` compare answers bitwise; == does not tell 0.0 from -0.0.

    tokens: generated ids. logprobs: the natural logarithm of each chosen token's probability.
    top: for each generated token the (id, logprob) pairs in vLLM's order. prompt_logprobs, prompt_top: the same for
    prompt positions 1 .. len(prompt) - 1; empty when the request did not ask. digests: for each generated token a hash
    of its whole row of logits, over the full vocabulary; empty when the request did not ask. experts: for each position
    of the prompt and of the generated tokens but the last, the experts of every layer as hexadecimal text; empty where
    the engine returns none. seed: the seed that the engine names for a sampled answer, None where it names none; it
    is not compared. weights_changed: the engine says that weights changed while it made the answer. pooled: what a
    pooling model returns, an embedding, scores, or the rows of all tokens one after the other; such an answer has no
    tokens.
    """

    tokens: list[int]
    logprobs: list[float] = []
    top: list[list[tuple[int, float]]] = []
    prompt_logprobs: list[float] = []
    prompt_top: list[list[tuple[int, float]]] = []
    text: str = ""
    digests: list[str] = []
    experts: list[str] = []
    seed: int | None = None
    weights_changed: bool = False
    pooled: list[float] = []


class Difference(msgspec.Struct, frozen=True):
    """Counts of compared positions (generated, prompt, and numbers of pooled vectors), and where two answers part.

    differing: positions where the token, its logprob, a top logprob or the logits' digest is not bitwise the same.
    tokens_changed: positions with another token. largest, ulps: the greatest |difference| of logprobs, and the greatest
    distance in steps of float32, up to the first changed token (later positions belong to different texts).
    first: a description of the first differing position. generated, prompt: the differing positions, counted from 0 in
    the generated tokens and in the prompt. digests: rows of logits compared by their digest. undefined: positions that
    have NaN on both sides, which proves nothing; `compared` leaves them out.
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
    """Compare two answers to the same request, position by position, bitwise. Raises NotComparable."""
    if expected.weights_changed or got.weights_changed:
        raise NotComparable(f"{label}: weights changed while the engine made the answer".lstrip(": "))
    return (
        _compare_prompt(expected, got, label)
        + _compare_generated(expected, got, label)
        + _compare_experts(expected, got, label)
        + _compare_pooled(expected, got, label)
    )


def checked(requests: Sequence[Request], answers: Sequence[Answer]) -> list[Answer]:
    """Return the answers. Raises AnswerIncomplete when an answer lacks something that its request asked for.

    Without this check, two engines that both leave out the logprobs would appear to agree.
    """
    if len(requests) != len(answers):
        raise AnswerIncomplete(f"{len(requests)} requests got {len(answers)} answers")
    for request, answer in zip(requests, answers):
        if request.abort:
            continue
        if answer.pooled:
            continue
        wanted = len(answer.tokens)
        if not wanted and request.max_tokens:
            raise AnswerIncomplete(f"a request for {request.max_tokens} tokens got none")
        if request.logprobs is not None and not len(answer.logprobs) == len(answer.top) == wanted:
            raise AnswerIncomplete(
                f"{wanted} tokens came with {len(answer.logprobs)} logprobs and {len(answer.top)} lists of top tokens: "
                "let the engine return logprobs"
            )
        if request.images and request.prompt_logprobs is not None:
            if not len(answer.prompt_logprobs) == len(answer.prompt_top) >= len(request.prompt):
                raise AnswerIncomplete("a prompt with images came without all of its prompt logprobs")
            continue
        wanted = len(request.prompt) - 1
        if request.prompt_logprobs is not None and not len(answer.prompt_logprobs) == len(answer.prompt_top) == wanted:
            raise AnswerIncomplete(
                f"a prompt of {wanted + 1} tokens came with {len(answer.prompt_logprobs)} of {wanted} prompt logprobs: "
                "let the engine return prompt logprobs"
            )
    return list(answers)


def same(a: float, b: float) -> bool:
    """Whether two floats are bitwise equal. All NaNs count as equal; -0.0 and 0.0 differ."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return a == b and math.copysign(1.0, a) == math.copysign(1.0, b)


def _same_top(a: list[tuple[int, float]], b: list[tuple[int, float]]) -> bool:
    return len(a) == len(b) and all(x[0] == y[0] and same(x[1], y[1]) for x, y in zip(a, b))


def _undefined(a: float, b: float, top_a: list[tuple[int, float]], top_b: list[tuple[int, float]]) -> bool:
    """Whether the logprobs of a position include NaN. Called for positions whose sides are the same."""
    return any(math.isnan(value) for value in (a, b, *(v for _, v in top_a), *(v for _, v in top_b)))


def ulps(a: float, b: float) -> int:
    """The number of float32 steps from a to b; 0 for the same bits, or when a or b is NaN."""
    if same(a, b) or math.isnan(a) or math.isnan(b):
        return 0
    return abs(_rank(a) - _rank(b))


def _rank(value: float) -> int:
    """The rank of a float32 among all float32 values in ascending order; -0.0 is just below 0.0."""
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
    # The first changed token still follows the same text, so the logprobs that both sides give there are comparable.
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


def _compare_experts(expected: Answer, got: Answer, label: str) -> Difference:
    """Compare the experts of each position; positions are counted from the prompt's first token."""
    count = max(len(expected.experts), len(got.experts))
    wrong = [i for i in range(count) if _at(expected.experts, i) != _at(got.experts, i)]
    first = f"{label}: position {wrong[0]}: the returned experts changed".lstrip(": ") if wrong else ""
    return Difference(count, len(wrong), first=first)


def _compare_pooled(expected: Answer, got: Answer, label: str) -> Difference:
    """Compare the numbers of a pooled vector, or of the scores. Vectors of different lengths differ everywhere."""
    a, b = expected.pooled, got.pooled
    count = max(len(a), len(b))
    if len(a) != len(b):
        return Difference(count, count, first=f"{label}: {len(a)} numbers became {len(b)}".lstrip(": "))
    wrong = [i for i, (x, y) in enumerate(zip(a, b)) if not same(x, y)]
    undefined = sum(math.isnan(x) and math.isnan(y) for x, y in zip(a, b))
    first = ""
    if wrong:
        i = wrong[0]
        first = f"{label}: number {i} of {count}: {a[i]!r} became {b[i]!r}".lstrip(": ")
    pairs = list(zip(a, b))
    return Difference(count - undefined, len(wrong), 0, _largest(pairs), first, _ulps(pairs), undefined=undefined)


def _words(pair: tuple[float, float], tops: tuple[list, list]) -> str:
    """A description of how a position differs whose token is the same."""
    if not same(*pair):
        return f"logprob {pair[0]!r} became {pair[1]!r}"
    if not _same_top(*tops):
        return "a top logprob, or the order of the top tokens, changed"
    return "the row of logits changed"


def _shared(a: list[tuple[int, float]], b: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Pairs of logprobs of the tokens that both lists hold."""
    other = dict(b)
    return [(value, other[token]) for token, value in a if token in other]


def _largest(pairs: Iterable[tuple[float, float]]) -> float:
    gaps = (abs(a - b) for a, b in pairs if not same(a, b))
    return max((gap if gap == gap else math.inf for gap in gaps), default=0.0)  # inf for NaN against a number


def _ulps(pairs: Iterable[tuple[float, float]]) -> int:
    return max((ulps(a, b) for a, b in pairs), default=0)


def _at(items: list, index: int, default: object = None):
    return items[index] if index < len(items) else default
