"""Certificates of attention without a cache: on this device, a prompt's rows have the same bits beside any prompts.

Encoders attend over whole prompts in both directions. Each of several prompts is computed alone. The same prompts are
then computed beside others, shorter and longer, before and after them, and the rows are compared bitwise. The layer's
own code runs. A layer that fails has no other kernel, so the engine stops.
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

OPERATION = "cuda.encoder_attention"
DATA = "prompts alone and beside others; flat and peaked scores"
LENGTHS = (1, 5, 64, 127, 128, 129, 200, 300, 512, 1500)

# (q [tokens, heads, D], k and v [tokens, key heads, D], the tokens of each prompt) -> the rows of all prompts.
Attend = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", Sequence[int]], "torch.Tensor"]


class Problem(attention_layers.Problem):
    """One kind of encoder layer, which has no pages: page is 0."""


def certify(problem: Problem, attend: Attend, library: str, cache: Path) -> Certificate:
    """Compare prompts alone with the same prompts beside others.

    library: the version of the kernel's library. cache: the folder of certificates.
    """
    key = _key(problem, library)
    return certificates.obtain(cache, key, lambda: _certify(problem, attend, key))


def rehearse(problem: Problem, attend: Attend, library: str, cache: Path, ahead: Ahead) -> None:
    """Compile ahead what `certify` will launch. Does nothing if `cache` has the certificate."""
    if certificates.load(cache, _key(problem, library)) is not None:
        return

    def call():
        import torch

        for before, after in companies(LENGTHS[-1]):
            lengths = [*before, LENGTHS[-1], *after]
            shape = (sum(lengths), problem.head_size)
            q, k = (
                torch.zeros((shape[0], heads, shape[1]), dtype=problem.dtype, device="cuda")
                for heads in (problem.heads, problem.key_heads)
            )
            attend(q, k, k.clone(), lengths)

    ahead.rehearse(call)


def companies(length: int) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens of the prompts before and after a prompt of `length` tokens, in each step that is compared."""
    yield [7], []
    yield [], [900]
    yield [64, 3], [5] * 40
    yield [1] * 130, [2000]
    yield [2000], [512] * 3
    yield [length] * 20, [length] * 20


def _key(problem: Problem, library: str) -> Key:
    return attention_layers.key(OPERATION, problem, library, DATA)


def _certify(problem: Problem, attend: Attend, key: Key, device: str = "cuda") -> Certificate:
    import torch

    tally = Tally(list(LENGTHS))
    generator = torch.Generator(device).manual_seed(problem.head_size)

    def random(tokens: int, factor: int) -> list[torch.Tensor]:
        """q, k and v."""
        heads = (problem.heads, problem.key_heads, problem.key_heads)
        made = [torch.randn((tokens, n, problem.head_size), generator=generator, device=device) for n in heads]
        return [(part * (factor if i == 0 else 1)).to(problem.dtype) for i, part in enumerate(made)]

    for scores, factor in (("flat", 1), ("peaked", 6)):
        for length in LENGTHS:
            own = random(length, factor)
            want = attend(*own, [length])
            if not bool(torch.isfinite(want).all()) or not bool(want.any()):
                raise ArithmeticError("attention of a whole prompt gives values that are not finite, or only zeros")
            for before, after in companies(length):
                first = sum(before)
                parts = zip(random(first, factor), own, random(sum(after), factor))
                got = attend(*(torch.cat(part) for part in parts), [*before, length, *after])
                beside = f"a prompt of {length} tokens beside prompts of {[*before, *after]}"
                said = f"{beside}, {scores} scores: %d of {want.numel()} elements differ"
                tally.add_later(want.numel(), bits.count(got[first : first + length], want), said.__mod__)
    return tally.certificate(key, "kept")
