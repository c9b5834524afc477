"""Compares attention of an encoder of images in company: each image has the bits that it has alone.

Images of several lengths go through attention alone, all in one call, and in the other order. The scores are flat and
peaked: a peaked row shows another maximum, a flat one another order of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Lengths of images: of one tile of queries or keys, one more, one less, and several.
LENGTHS = (1, 7, 64, 65, 127, 128, 129, 176, 177, 300, 1025)

# (q, k, v [1, tokens, heads, D], the ends of the images [images + 1], the longest) -> rows [1, tokens, heads, D].
Attend = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def differs(attend: Attend, heads: int, head_size: int, dtype: torch.dtype, device: str = "cuda") -> str:
    """The length of the first image that has other bits in company than alone, in words; "" if none has."""
    import torch

    source = torch.Generator(device="cpu").manual_seed(head_size)
    images = [torch.randn((3, n, heads, head_size), generator=source).to(device, dtype) for n in LENGTHS]

    def run(chosen: Sequence[torch.Tensor], factor: int) -> list[torch.Tensor]:
        lengths = [image.shape[1] for image in chosen]
        ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        q, k, v = torch.cat(list(chosen), 1).unsqueeze(1)
        out = attend(q * factor, k, v, ends, torch.tensor(max(lengths), dtype=torch.int32))
        return list(out.reshape(-1, heads * head_size).split(lengths))

    with torch.inference_mode():
        for factor in (1, 6):
            alone = [run([image], factor)[0] for image in images]
            for order in (range(len(images)), range(len(images) - 1, -1, -1), (2, 2, 0), (9, 0, 9)):
                for i, rows in zip(order, run([images[i] for i in order], factor), strict=True):
                    if not torch.equal(rows, alone[i]):
                        return f"attention over {LENGTHS[i]} tokens among {len(order)} images"
    return ""
