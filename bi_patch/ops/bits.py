"""The one comparison of bits, which counts differing elements, and a checksum of bits, which tells of a write."""

from __future__ import annotations

from collections.abc import Iterable
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


def checksum(tensor: torch.Tensor) -> int:
    """A number of the bits of a tensor and of their places, in one pass: 64 bits, the same on every device.

    tensor: of any shape, strides and dtype. Only its bits count, in the order of its elements. This is no cryptographic
    hash: it is for telling apart tensors that nobody made to collide.
    """
    return int(_checksum(tensor, {}))


def checksums(tensors: Iterable[torch.Tensor]) -> list[int]:
    """The `checksum` of each tensor. The host waits for each device once."""
    import torch

    places: dict[torch.device, torch.Tensor] = {}
    found = [_checksum(tensor, places) for tensor in tensors]
    if len({held.device for held in found}) > 1:
        return [int(held) for held in found]
    return torch.stack(found).tolist() if found else []


def _checksum(tensor: torch.Tensor, places: dict[torch.device, torch.Tensor]) -> torch.Tensor:
    """The checksum of a tensor on its device [] int64. places: the factors of words by device, made when needed."""
    import torch

    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64)
    even = words.numel() // _COLUMNS * _COLUMNS
    if tensor.device not in places:
        places[tensor.device] = torch.arange(1, 2 * (_COLUMNS + 8), 2, device=tensor.device)
    factors = places[tensor.device]
    # Sums modulo 2**64 do not depend on their order. Columns of a prime number: packing moves no word by such a stride.
    columns = words[:even].view(-1, _COLUMNS).sum(0)
    rest = words[even:]
    if whole < flat.numel():
        rest = torch.cat((rest, flat[whole:].to(torch.int64)))
    return (columns * factors[:_COLUMNS]).sum() + (rest * factors[: rest.numel()]).sum()


def _integers(got: torch.Tensor, want: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    if got.shape != want.shape or got.dtype != want.dtype:
        raise ValueError(f"cannot compare {got.dtype} {tuple(got.shape)} with {want.dtype} {tuple(want.shape)}")
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(got.element_size())
    if integer is None:
        raise ValueError(f"cannot compare the bits of {got.dtype}")
    return got.view(integer), want.view(integer)
