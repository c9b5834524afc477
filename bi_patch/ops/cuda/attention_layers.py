"""What tells two kinds of attention layers apart in certificates."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bi_patch.ops.certificates import Key
from bi_patch.ops.cuda import machine

if TYPE_CHECKING:
    import torch

# Longer than the tiles of every kernel and, up to a limit, longer than the window.
_TOKENS, _LONGEST_WINDOW = 1500, 4096


class Problem(NamedTuple):
    """One kind of attention layer. heads, key_heads: of one rank. window: in tokens, 0 without. page: tokens per page,
    0 for a layer without a cache, whose window is on both sides.

    backend: the name and version of the kernel. extras: words for everything else that chooses code, e.g. "sinks".
    """

    backend: str
    heads: int
    key_heads: int
    head_size: int
    window: int
    page: int
    dtype: torch.dtype
    extras: str = ""

    def __str__(self) -> str:
        window = f" window={self.window}" if self.window else ""
        page = f" page={self.page}" if self.page else ""
        extras = f" {self.extras}" if self.extras else ""
        size = f"heads={self.heads}/{self.key_heads} D={self.head_size}{page}"
        return f"{self.backend} {size}{window}{extras} {machine.name(self.dtype)}"


def key(operation: str, problem: Problem, library: str, data: str) -> Key:
    """The key of a certificate. library: the version of the kernel's library. data: words for what is compared."""
    libraries = f"{library} {machine.libraries()}"
    return Key(operation, str(problem), machine.device(), libraries, machine.kernels_digest(), data)


def tokens(problem: Problem) -> int:
    """How many tokens the prompt of a certificate has."""
    return _TOKENS + min(problem.window, _LONGEST_WINDOW)


def blank(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Zeros as q [tokens, heads, D], k and v [tokens, key heads, D] of this prompt, to compile kernels with."""
    import torch

    return tuple(
        torch.zeros((tokens(problem), heads, problem.head_size), dtype=problem.dtype, device="cuda")
        for heads in (problem.heads, problem.key_heads, problem.key_heads)
    )


def random(problem: Problem, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal random numbers as q, k and v of this prompt, the same ones for a seed."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    shapes = ((tokens(problem), heads, problem.head_size) for heads in (problem.heads, *[problem.key_heads] * 2))
    return tuple(torch.randn(shape, generator=generator, device=device).to(problem.dtype) for shape in shapes)
