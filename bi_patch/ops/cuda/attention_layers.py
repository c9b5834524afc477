"""What tells two kinds of attention layers apart in certificates."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bi_patch.ops.certificates import Key
from bi_patch.ops.cuda import machine

if TYPE_CHECKING:
    import torch


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
