"""The one comparison of bits, which counts differing elements, and a checksum of bits, which tells of a write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_COLUMNS = 4093


def differing(got: torch.Tensor, want: torch.Tensor) -> int:
    """How many elements of two tensors differ in any bit. Equal tensors take one pass.

    got, want: tensors on one device, of one shape and one dtype, with 1, 2, 4 or 8 bytes per element. Their strides may
    differ. A NaN equals a NaN with the same bits; 0.0 differs from -0.0. Raises ValueError if the shapes or dtypes
    differ, or for an element of another size.
    """
    import torch

    a, b = _integers(got, want)
    return 0 if torch.equal(a, b) else int((a != b).sum())


def count(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """As `differing`, but the number stays on the tensors' device [] int64, so that the host need not wait for it."""
    a, b = _integers(got, want)
    return (a != b).sum()


def total(counts: Iterable[torch.Tensor]) -> int:
    """The sum of numbers of `count`. The host waits for the device once, which matters on a GPU that others use."""
    import torch

    held = list(counts)
    return int(torch.stack(held).sum()) if held else 0


def checksum(tensor: torch.Tensor) -> int:
    """A number of the bits of a tensor and of their places, in one pass: 64 bits, the same on every device.

    tensor: of any shape, strides and dtype. Only its bits count, in the order of its elements. This is no cryptographic
    hash: it is for telling apart tensors that nobody made to collide.
    """
    return checksums([tensor])[0]


def checksums(tensors: Iterable[torch.Tensor]) -> list[int]:
    """The `checksum` of each tensor. Few launches for each tensor; the host waits for each device once."""
    folded: dict[torch.device, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    count = 0
    for tensor in tensors:
        folded.setdefault(tensor.device, []).append((count, *_folded(tensor)))
        count += 1
    found = [0] * count
    for held in folded.values():
        places, columns, rests = zip(*held, strict=True)
        for place, number in zip(places, _weighed(columns, rests), strict=True):
            found[place] = number
    return found


def _folded(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of a tensor's columns of words [_COLUMNS] int64, and the words that fill no row, as a copy.

    Sums modulo 2**64 do not depend on their order. Columns of a prime number: packing moves no word by such a stride.
    """
    import torch

    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64)
    even = words.numel() // _COLUMNS * _COLUMNS
    return words[:even].view(-1, _COLUMNS).sum(0), torch.cat((words[even:], flat[whole:].to(torch.int64)))


def _weighed(columns: Sequence[torch.Tensor], rests: Sequence[torch.Tensor]) -> list[int]:
    """The checksums of tensors on one device, from what `_folded` returns for each."""
    import torch

    device = columns[0].device
    factors = torch.arange(1, 2 * (_COLUMNS + 8), 2, device=device)
    ends = torch.tensor([0, *(len(rest) for rest in rests)]).cumsum(0).to(device)
    weighed = torch.cat(rests) * torch.cat([factors[: len(rest)] for rest in rests])
    sums = torch.cat((factors.new_zeros(1), weighed.cumsum(0)))[ends]
    return ((torch.stack(columns) * factors[:_COLUMNS]).sum(1) + sums.diff()).tolist()


def _integers(got: torch.Tensor, want: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    if got.shape != want.shape or got.dtype != want.dtype:
        raise ValueError(f"cannot compare {got.dtype} {tuple(got.shape)} with {want.dtype} {tuple(want.shape)}")
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(got.element_size())
    if integer is None:
        raise ValueError(f"cannot compare the bits of {got.dtype}")
    return got.view(integer), want.view(integer)
