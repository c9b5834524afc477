"""Decode attention on CUDA by the bundled kernel, where a certificate shows that it gives the bits of prefill.

FlashAttention 3 serves prefill. For a single query, FlashAttention 3 either uses prefill's tiles, which are much too
large, or (for heads of 64) divides KV at other places. The bundled kernel keeps prefill's order in small tiles. The
certificate compares the kernel with prefill: it prefills one long prompt, then decodes the last token of many of the
prompt's beginnings, and compares the outputs bitwise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bi_patch.ops import bits, certificates
from bi_patch.ops.certificates import Certificate, Key, Tally
from bi_patch.ops.cuda import machine

if TYPE_CHECKING:
    import torch

OPERATION = "cuda.decode_attention"
DATA = (
    "beginnings of one prompt, flat and peaked scores, small and large pages, several tokens, none, two kinds of scales"
    ", zeros beside small products"
)
# Not the square root of a power of 2: with such a scale, products round alike in any order, which hides another order.
_ODD_SCALE = 168**-0.5
# The longest query of a step that checks drafts, and that the bundled kernel may serve.
_DRAFTS = 17
# Long enough that the kernel uses every slot of its shared memory many times.
_PROMPT, _SEVERAL = 7300, 5
_certified: dict[Problem, bool] = {}

# (q [tokens, heads, D], k and v [pages, page size, key heads, D], pages [1, most], scale) -> out, of q's shape: the
# served causal attention of a whole prompt. Over an e4m3 cache, the scales of K and V follow, [key heads] each.
Prefill = Callable[..., "torch.Tensor"]


class Problem(NamedTuple):
    """One shape of attention. heads, key_heads: of one rank. dtype: of q. cache: of the KV cache, None for q's type."""

    heads: int
    key_heads: int
    head_size: int
    dtype: torch.dtype
    cache: torch.dtype | None = None

    def __str__(self) -> str:
        cache = f" over {machine.name(self.cache)}" if self.cache else ""
        return f"heads={self.heads}/{self.key_heads} D={self.head_size} {machine.name(self.dtype)}{cache}"


def serves(problem: Problem) -> bool:
    """Whether the bundled kernel is certified for `problem` in this process."""
    return _certified.get(problem, False)


def beginnings(tile: int) -> list[int]:
    """Lengths of beginnings: short ones, those around the ends of tiles of `tile` keys, and a few long ones."""
    around = (tile * i + d for i in range(1, 21) for d in (-1, 0, 1, 40))
    return sorted({*range(1, 40, 3), *around, 5000, 6200, _PROMPT})


def quick(longest: int, tokens: int, head_size: int, key_heads: int) -> bool:
    """Whether a step with queries of several tokens has so few that the bundled kernel is faster than prefill's: each
    pair of a token and a key head has a multiprocessor of its own. Bits are the same.

    longest: tokens of the longest query. tokens: new tokens of the step. Prefill's kernel reads a request's keys once
    for all its tokens. With small heads, it hears of long queries only.
    """
    return longest <= _DRAFTS and head_size > 64 and tokens * key_heads <= machine.processors()


def certify(problem: Problem, prefill: Prefill, library: str, cache: Path) -> Certificate | None:
    """Compare the bundled kernel with `prefill`. library: the version of prefill's kernel. cache: certificates' folder.

    The comparison takes a tenth of a second, so every process makes the certificate anew: the certificate on disk could
    be about another build of either kernel. Returns None for a problem that this process has certified before, and for
    a problem that the bundled kernel does not cover. Prefill's kernel decodes a problem that is not covered, and a
    problem whose certificate fails.
    """
    from bi_patch.kernels.cuda import decode, nvrtc

    if problem in _certified:
        return None
    nvrtc.folder = cache / "cubins"
    _certified[problem] = False
    if not decode.covers(*problem):
        return None
    key = Key(
        OPERATION,
        str(problem),
        machine.device(),
        f"{library} {machine.libraries()}",
        machine.kernels_digest("cuda"),
        DATA,
    )
    certificate = certificates.obtain(
        cache, key, lambda: _certify(problem, prefill, key), instead="prefill's kernel", anew=True
    )
    _certified[problem] = certificate.passed
    return certificate


def attend(q, k, v, out, starts, lengths, pages, scale: float, longest: int | None = None, scales=None) -> bool:
    """Write attention into `out` by the bundled kernel; bi_patch.kernels.cuda.decode.attend documents the arguments.

    Returns False, and writes nothing, if the kernel cannot take the tensors.
    """
    from bi_patch.kernels.cuda import decode

    try:
        decode.attend(q, k, v, out, starts, lengths, pages, scale, longest, scales=scales)
    except decode.Unfit:
        return False
    return True


def _certify(problem: Problem, prefill: Prefill, key: Key) -> Certificate:
    import torch

    from bi_patch.kernels.cuda import decode

    heads, key_heads, size, dtype, cache = problem
    known = beginnings(decode.TILES[size])
    tally = Tally(known)
    device = torch.cuda.current_device()
    # Compile and load now: graph capture allows neither.
    decode.prepare(heads, key_heads, size, dtype, device, cache is not None)
    generator = torch.Generator("cuda").manual_seed(size)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    # Scales of an e4m3 cache: each head's own, neither exact in 16 bits nor powers of 2; then 1, with code of its own.
    scales = tuple(torch.linspace(*ends, key_heads, device="cuda") for ends in ((0.3, 1.7), (1.1, 0.2)))
    ones = (torch.ones(key_heads, device="cuda"),) * 2
    kinds, kept = ([{}], dtype) if cache is None else ([{"scales": scales}, {"scales": ones}], cache)

    def layouts():
        """The prompt's q, k and v in random pages: small pages of K and of V, and large pages that hold K and V side
        by side, as in vLLM 0.26; and pages as large as models with recurrent layers have them."""
        flat, peaked, large = ("flat", 16, 1.0, size**-0.5), ("peaked", 128, 6.0, _ODD_SCALE), ("large", 1024, 3.0, 0.1)
        # Over e4m3, bf16 queries may become fp16, where a zero has the exponent of other numbers: products with a zero
        # must not move smaller products beside them.
        tiny = [("tiny", 16, 2.0**-27, 2.0**28)] if cache is not None and dtype is torch.bfloat16 else []
        for what, page, factor, scale in (flat, peaked, large, *tiny):
            blocks = -(-_PROMPT // page)
            pages = torch.randperm(blocks, generator=generator, device="cuda").to(torch.int32)[None]
            if page == 16:
                k, v = (random(blocks, page, key_heads, size).to(kept) for _ in range(2))
            else:
                k, v = random(blocks, key_heads, page, 2 * size).to(kept).transpose(1, 2).split(size, dim=-1)
            q = (random(_PROMPT, heads, size) * factor).contiguous()
            if what == "tiny":
                q += 2 * factor * q.sign()
                q[..., ::16] = 8.0
                k = (k.to(dtype) * 2.0**-4).to(kept)
                k.view(torch.uint8)[..., ::16] = 0
            if cache is not None and what == "large":
                q[::3, :, 5] *= 2.0**-40  # such a query does not fit into fp16 beside others
            yield what, q, k, v, pages, scale

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    # One request per length, then a request with the prompt's last tokens, then a request without tokens.
    number = len(known)
    rows = ints([*(length - 1 for length in known), *range(_PROMPT - _SEVERAL, _PROMPT)]).long()
    starts, lengths = ints([*range(number + 1), len(rows), len(rows)]), ints([*known, _PROMPT, 1])
    for what, q, k, v, pages, scale in layouts():
        held = pages.expand(len(lengths), -1)
        for more in kinds:
            want = prefill(q, k, v, pages, scale, **more)[rows]
            for form in decode.serving(heads, key_heads, size, dtype, device, cache is not None):
                got = torch.empty_like(want)
                decode.attend(q[rows], k, v, got, starts, lengths, held, scale, form=form, **more)
                wrong = bits.differing(got, want)
                said = f"{what} scores, {form.parts} parts: {wrong} of {got.numel()} elements differ from prefill"
                tally.add(got.numel(), wrong, said)
    return tally.certificate(key, "bundled decode")
