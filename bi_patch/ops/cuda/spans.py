"""Certificates of attention over images: on this device, a row has the same bits in any step that holds whole images.

In some models (Gemma 3) the tokens of an image attend to each other in both directions, and text attends to what comes
before it. A prompt with such spans is computed in one piece, with the spans and without. Its rows are then computed in
steps that end at no place inside a span, alone and beside sequences of the other kind, and compared bitwise. Rows after
a span are compared in steps that name no span, too: CUDA graphs of decodes hold none. The layer's own code runs. A
layer that fails has no other kernel, so the engine stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bi_patch.ops import bits, certificates
from bi_patch.ops.certificates import Certificate, Key, Tally
from bi_patch.ops.cuda import attention_layers
from bi_patch.ops.cuda.ahead import Ahead

if TYPE_CHECKING:
    import torch

OPERATION = "cuda.span_attention"
DATA = "one prompt with and without spans, in steps and beside others; flat and peaked scores"
_SPANS = ((37, 292), (293, 316), (700, 955))  # the first and the last token of each
_SIZES = (16, 129, 300)  # the fewest tokens of a step, but for the last one

# (the first token, the number of tokens, whether the sequence has the spans) of each sequence of a step.
Step = Sequence[tuple[int, int, bool]]
# A step, and whether it may name spans -> the rows of all sequences [sum of tokens, heads, D].
Run = Callable[[Step, bool], "torch.Tensor"]
# (q [tokens, heads, D], k and v [tokens, key heads, D]) -> how to compute rows of this prompt.
Prepare = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], Run]


class Problem(attention_layers.Problem):
    """One kind of attention layer, in a model whose images attend in both directions."""


def certify(problem: Problem, prepare: Prepare, library: str, cache: Path) -> Certificate:
    """Compare the rows of one prompt, computed in many ways, with the prompt in one piece.

    library: the version of the kernel's library. cache: the folder of certificates.
    """
    key = _key(problem, library)
    return certificates.obtain(cache, key, lambda: _certify(problem, prepare, key))


def rehearse(problem: Problem, prepare: Prepare, library: str, cache: Path, ahead: Ahead) -> None:
    """Compile ahead what `certify` will launch. Does nothing if `cache` has the certificate."""
    if certificates.load(cache, _key(problem, library)) is not None:
        return

    def call():
        tokens = attention_layers.tokens(problem)
        run = prepare(*attention_layers.blank(problem))
        run([(0, tokens, False)], False)
        for _, step, named in steps(of(problem), tokens):
            run(step, named)

    ahead.rehearse(call)


def _key(problem: Problem, library: str) -> Key:
    return attention_layers.key(OPERATION, problem, library, DATA)


def of(problem: Problem) -> list[tuple[int, int]]:
    """The first and the last token of each span of the prompt. vLLM makes no span that is longer than a window."""
    longest = problem.window or attention_layers.tokens(problem)
    return [(first, min(last, first + longest - 1)) for first, last in _SPANS]


def cuts(spans: list[tuple[int, int]], tokens: int, size: int) -> list[tuple[int, int]]:
    """(first token, tokens) of steps of about `size` tokens over a prompt. None ends inside a span."""
    found, first = [], 0
    while first < tokens:
        end = min(first + size, tokens)
        for start, last in spans:
            if start < end <= last:
                end = start if first < start else last + 1
        found.append((first, end - first))
        first = end
    return found


def steps(spans: list[tuple[int, int]], tokens: int) -> Iterator[tuple[str, Step, bool]]:
    """The ways to compute rows of a prompt of `tokens` tokens. Yields words for an error, a step, and whether it names
    spans."""
    outside = [at for at in range(0, tokens, 7) if not any(first <= at <= last for first, last in spans)]
    text = [(at, 1, True) for at in sorted({*outside, spans[0][0] - 1, spans[-1][1] + 1, tokens - 1})]
    yield "single rows of text, no spans named", text, False
    yield "single rows of text", text, True
    yield "one row of text, no spans named", [(tokens - 1, 1, True)], False
    yield "one row of text beside a prompt without spans", [(tokens - 1, 1, True), (0, 300, False)], True
    for size in _SIZES:
        yield f"steps of {size}", [(first, count, True) for first, count in cuts(spans, tokens, size)], True
    for first, last in spans:
        middle = (first + last) // 2
        yield "a span alone", [(first, last - first + 1, True)], True
        yield "the rest of a span", [(middle, last - middle + 1, True)], True
        yield "the last row of a span, no spans named", [(last, 1, True)], False
        yield "the rest of a span and text", [(middle, tokens - middle, True), (0, 9, False)], True
    others = [(0, 9, False), (0, 10, False), (250, 200, False), *((at, 1, False) for at in range(0, tokens, 129))]
    yield "prompts with and without spans", [(0, tokens, True), (0, tokens, False), *others], True
    yield "prompts without spans before one with spans", [*others, (0, tokens, True)], True


def _certify(problem: Problem, prepare: Prepare, key: Key, device: str = "cuda") -> Certificate:
    import torch

    tokens = attention_layers.tokens(problem)
    tally = Tally([tokens])
    q, k, v = attention_layers.random(problem, problem.head_size + 1, device)
    for scores, factor in (("flat", 1), ("peaked", 6)):
        run = prepare(q * factor, k, v)
        want = {spans: run([(0, tokens, spans)], spans) for spans in (True, False)}
        if not bool(torch.isfinite(want[True]).all()) or not bool(want[True].any()):
            raise ArithmeticError("attention over spans gives values that are not finite, or only zeros")
        if torch.equal(want[True], want[False]):
            raise ArithmeticError("attention over spans gives the bits of causal attention")
        for what, step, named in steps(of(problem), tokens):
            got = run(step, named)
            expected = torch.cat([want[spans][first : first + count] for first, count, spans in step])
            said = f"{what}, {scores} scores: %d of {got.numel()} elements differ"
            tally.add_later(got.numel(), bits.count(got, expected), said.__mod__)
    return tally.certificate(key, "kept")
