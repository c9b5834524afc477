"""Chunk certificates of attention: on this device, a token's row has the same bits however its prompt was computed.

One prompt is computed in one piece. The same rows are then computed in chunks, one by one, and beside chunks of other
lengths, over the same cached keys and values, and the outputs are compared bitwise. The layer's own code runs: its
backend, its window, soft cap, sinks and ALiBi slopes. A layer that fails has no other kernel, so the engine stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bi_patch.ops import bits, certificates
from bi_patch.ops.certificates import Certificate, Key, Tally
from bi_patch.ops.cuda import attention_layers
from bi_patch.ops.cuda.ahead import Ahead
from bi_patch.ops.cuda.attention_layers import Problem

if TYPE_CHECKING:
    import torch

OPERATION = "cuda.attention"
DATA = "one prompt in chunks, single rows, and both together; flat and peaked scores"
_CHUNKS = (9, 16, 17, 64, 129, 300)

# (the first token, the number of tokens) of each sequence of a step -> their rows [sum of tokens, heads, D].
Run = Callable[[list[tuple[int, int]]], "torch.Tensor"]

# (q [tokens, heads, D], k and v [tokens, key heads, D]) -> how to compute rows of this prompt.
Prepare = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], Run]


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
        for sequences in ([(0, tokens)], *(sequences for _, sequences in steps(tokens))):
            run(sequences)

    ahead.rehearse(call)


def _key(problem: Problem, library: str) -> Key:
    return attention_layers.key(OPERATION, problem, library, DATA)


def steps(tokens: int) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """The ways to compute rows of a prompt of `tokens` tokens: words for an error, and (first token, tokens) of each
    sequence of one step."""
    last = tokens - 1
    singles = sorted({*range(0, 40, 3), *range(127, tokens, 127), *range(128, tokens, 128), last})
    yield "single rows", [(at, 1) for at in singles]
    yield "150 equal rows", [(last, 1)] * 150
    for at in (8, 300, last):
        yield "one row alone", [(at, 1)]
        yield "one row beside prompts of 9 and 10 tokens", [(at, 1), (0, 9), (0, 10)]
    for size in _CHUNKS:
        cuts = [(at, min(size, tokens - at)) for at in range(0, tokens, size)]
        yield f"chunks of {size}", cuts
        yield f"one chunk of {size}", [cuts[-2]]
    yield "a chunk beside single rows", [(200, 700), *((at, 1) for at in singles[::3])]


def _certify(problem: Problem, prepare: Prepare, key: Key, device: str = "cuda") -> Certificate:
    import torch

    tokens = attention_layers.tokens(problem)
    tally = Tally([tokens])
    q, k, v = attention_layers.random(problem, problem.head_size, device)
    for scores, factor in (("flat", 1), ("peaked", 6)):
        run = prepare(q * factor, k, v)
        want = run([(0, tokens)])
        if not bool(torch.isfinite(want).all()) or not bool(want.any()):
            raise ArithmeticError("attention of a whole prompt gives values that are not finite, or only zeros")
        for what, sequences in steps(tokens):
            rows = [at for first, count in sequences for at in range(first, first + count)]
            got = run(sequences)
            said = f"{what}, {scores} scores: %d of {got.numel()} elements differ"
            tally.add_later(got.numel(), bits.count(got, want[rows]), said.__mod__)
    return tally.certificate(key, "kept")
