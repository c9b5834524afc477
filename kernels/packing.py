"""How weights of 4 and 8 bits lie in memory for the bundled kernels. w[n, k] = round((q[n, k] - z[n, g]) * s[n, g]).

The weights w have the type of x, bf16 or fp16, and are rounded once. g = k // group. The integers q are from 0 to
2**bits - 1. s is [K / group, N], so that the scales of neighbouring rows lie side by side, and z as s.

Of 4 bits, the unit is a strip of 16 rows and 64 elements of K, as 32 lanes of a warp hold it for four instructions
mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16"): 16 bytes for each lane, 4 for each instruction. Of such 4
bytes, bits 4 r to 4 r + 3 and 16 + 4 r to 19 + 4 r are the two integers of register r. So a lane loads its part in one
piece, and unpacks two integers in one step, as Marlin does (github.com/IST-DASLab/marlin).

Of 8 bits, the unit is the same strip, and a lane has 16 bytes for rows g = lane / 4, registers 0 and 2 of each
instruction, and 16 more, 512 bytes later, for rows g + 8, registers 1 and 3. Of the 4 bytes for each instruction, the
first and the third are the two integers of the first register, and the others those of the second.

Floats e2m1 (OCP Microscaling Formats 1.0: a sign, two bits of exponent, one of mantissa) have no zero points, and x is
bf16. w[n, k] = v[n, k] * s[n, g] * 2**-7, which is exact, and the sum over K is multiplied by an fp32 number `whole`,
before the bias is added. Their 4 bytes for each instruction are four registers' worth of bits, too, in an order that
takes few instructions to unpack (`_PLACES`). A scale is the byte whose bits are those of s * 2**119 in bf16 from the
fifth exponent bit to the third of the mantissa; the bits above are ones, those below zeros. The scales of a strip and a
block of 128 elements of K are contiguous: a row's and the eighth row's after it, for each group, for each of 8 rows.
Each expert has a `whole` of its own. In groups of 32 there is none: s is 2**7 times a power of two (e8m0 of the same
standard), so w is v times the power.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

BLOCK_K, STRIP = 128, 16
MIDDLE = {4: 8, 8: 128}
# The float whose last bit of the mantissa is 1, by type: setting the low bits of its mantissa adds an integer.
BASE = {"torch.bfloat16": 128, "torch.float16": 1024}
# Of e2m1, where the mantissa, the exponent and the sign of a register's element lie, in bits of 16. The sign of the
# second register lies in the other 16.
_PLACES = ((14, 7, 15), (10, 11, 3), (4, 5, 13), (0, 1, 9))
_LEAST, _END = 2.0**-22, 2.0**9  # a scale of e2m1 is at least the first, and less than the second
_EXPONENTS = 98, 128  # of e8m0: the least and the greatest that have a byte
_OF_EXPONENT = 32  # floats e2m1 that share one


class Packed(NamedTuple):
    """Packed weights [N, K], or those of experts [E, N, K], one expert after the other.

    data: uint8, N * K * bits / 8 elements for each expert. scale: [K / group, N], or [E, K / group, N], bf16 or fp16.
    zero: the zero points, of scale's shape and type, or None: of 4 bits plus BASE, of 8 bits less 128. bits: 4 or 8.
    group: elements of K. whole: of e2m1, fp32 [], or [E] (`has_whole`), by which sums are multiplied. Of e2m1, scale is
    uint8, and its shape says nothing of its order.
    """

    data: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    group: int
    whole: torch.Tensor | None = None

    @property
    def floats(self) -> bool:
        """Whether weights are floats e2m1."""
        return str(self.scale.dtype) == "torch.uint8"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        *_, groups, n = self.scale.shape
        return n, self.data.numel() * 8 // self.bits // (self.scale.numel() // groups)


def covers(n: int, k: int, bits: int, group: int, floats: bool = False) -> bool:
    """Whether there are kernels for such weights. floats: e2m1."""
    if floats:
        return n % STRIP == 0 and k % BLOCK_K == 0 and bits == 4 and group in (16, 32)
    return n % STRIP == 0 and k % BLOCK_K == 0 and bits in MIDDLE and (group in (32, 64) or group % BLOCK_K == 0)


def has_whole(group: int, experts: bool) -> bool:
    """Whether sums of floats e2m1 in groups of so many are multiplied by a number `whole`."""
    return not experts or group != _OF_EXPONENT


def covers_float_experts(n: int, k: int) -> bool:
    """Whether `pack_float_experts` takes experts' floats e2m1 [N, K]."""
    return k > 0 and k % _OF_EXPONENT == 0 and covers(n, -(-k // BLOCK_K) * BLOCK_K, 4, _OF_EXPONENT, True)


def pack(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> Packed:
    """Pack integers q [N, K], uint8, with scales [N, K / group], bf16 or fp16.

    zero: integers [N, K / group], or None for 2**(bits - 1). Raises ValueError if `covers` is false.
    """
    n, k = q.shape
    group = k // scale.shape[1]
    if not covers(n, k, bits, group):
        raise ValueError(f"cannot pack {n} x {k} of {bits} bits in groups of {group}")
    if zero is not None:
        base = BASE[str(scale.dtype)] if bits == 4 else -MIDDLE[8]
        zero = (zero.int() + base).T.to(scale.dtype).contiguous()
    data = _four(q) if bits == 4 else _eight(q)
    return Packed(data.contiguous().view(-1), scale.T.contiguous(), zero, bits, group)


def pack_experts(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> Packed:
    """Pack experts' integers q [E, N, K] of 4 bits, uint8, with scales [E, N, K / group], bf16 or fp16.

    zero: integers [E, N, K / group], or None for 8. Raises ValueError if `covers` is false, or if there is no expert.
    """
    import torch

    if not len(q):
        raise ValueError("no experts to pack")
    made = [pack(*one, 4) for one in zip(q, scale, zero if zero is not None else [None] * len(q), strict=True)]
    data = torch.cat([one.data for one in made])
    zeros = None if zero is None else torch.stack([one.zero for one in made])
    return Packed(data, torch.stack([one.scale for one in made]), zeros, 4, made[0].group)


def pack_floats(q: torch.Tensor, scale: torch.Tensor, whole: torch.Tensor) -> Packed:
    """Pack floats e2m1 q [N, K], uint8 from 0 to 15, with scales [N, K / group] of any float type with at most 4
    significant bits, and one fp32 number `whole` for all: a weight is q * scale * whole.

    Raises ValueError if `covers` is false, or if a scale is not finite, or has no byte.
    """
    n, k = q.shape
    group = k // scale.shape[1]
    if not covers(n, k, 4, group, True):
        raise ValueError(f"cannot pack {n} x {k} floats of 4 bits in groups of {group}")
    data, scales = _scaled(q, scale, group)
    return Packed(data, scales.view(k // group, n), None, 4, group, (whole.float() * 2.0**7).reshape(()).clone())


def pack_scaled_experts(q: torch.Tensor, scale: torch.Tensor, whole: torch.Tensor) -> Packed:
    """Pack experts' floats e2m1 q [E, N, K], uint8 from 0 to 15, with scales [E, N, K / 16] as `pack_floats`, and an
    fp32 number for each expert, whole [E]: a weight is q * scale * whole.

    Raises ValueError as `pack_floats`, for other groups, and if there is no expert.
    """
    experts, n, k = q.shape
    group = k // scale.shape[2]
    if not experts or not covers(n, k, 4, group, True) or not has_whole(group, True):
        raise ValueError(f"cannot pack {experts} experts of {n} x {k} floats of 4 bits in groups of {group}")
    data, scales = _scaled(q.flatten(0, 1), scale.flatten(0, 1), group)
    wholes = (whole.float() * 2.0**7).reshape(experts).clone()
    return Packed(data, scales.view(experts, k // group, n), None, 4, group, wholes)


def _scaled(q: torch.Tensor, scale: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Floats e2m1 [N, K] and their scales [N, K / group], as bytes in the kernels' order. Raises ValueError for a scale
    that is not finite, or has no byte."""
    import torch

    held = scale.float()
    zero, below = held == 0, held < 0
    held = held.abs().where(~zero, 1)
    bits = (held * 2.0**119).to(torch.bfloat16)
    known = (held >= _LEAST) & (held < _END) & (bits.float() == held * 2.0**119)
    bits = bits.view(torch.int16)
    if not bool((known & (bits & 15 == 0)).all()):
        raise ValueError("a scale of floats of 4 bits is not finite, or out of range")
    # A scale has no sign, and is not zero: both go to the group's floats.
    turned = q ^ below.to(torch.uint8).mul_(8).repeat_interleave(group, 1)
    turned *= (~zero).to(torch.uint8).repeat_interleave(group, 1)
    return _floats(turned).view(-1), _laid((bits >> 4 & 255).to(torch.uint8), group)


def pack_float_experts(q: torch.Tensor, exponent: torch.Tensor) -> Packed:
    """Pack experts' floats e2m1 q [E, N, K], uint8 from 0 to 15, with e8m0 [E, N, K / 32], uint8: a weight is
    q * 2**(exponent - 127). K of what is returned is the next multiple of 128; the weights added are zeros.

    The exponent of 32 zeros does not count. Raises ValueError if `covers` is false for such weights, if there is no
    expert, or if another exponent has no byte: one from 98 to 128 has.
    """
    import torch

    experts, n, k = q.shape
    padded = -(-k // BLOCK_K) * BLOCK_K
    if not experts or not covers_float_experts(n, k):
        raise ValueError(f"cannot pack {experts} experts of {n} x {k} floats of 4 bits")
    least, greatest = _EXPONENTS
    zero = (q.view(experts, n, -1, _OF_EXPONENT) & 7 == 0).all(-1)
    held = exponent.where(~zero, least)
    if not bool(((held >= least) & (held <= greatest)).all()):
        found = held[(held < least) | (held > greatest)]
        raise ValueError(
            f"an exponent of experts' floats of 4 bits is {int(found[0])}, and must be from {least} to {greatest}"
        )
    added = padded - k
    q = torch.nn.functional.pad(q, (0, added))
    held = torch.nn.functional.pad(held - least, (0, added // _OF_EXPONENT)) * 8
    data = _floats(q.flatten(0, 1)).view(-1)
    scales = _laid(held.flatten(0, 1), _OF_EXPONENT).view(experts, padded // _OF_EXPONENT, n)
    return Packed(data, scales, None, 4, _OF_EXPONENT)


def _laid(scale: torch.Tensor, group: int) -> torch.Tensor:
    """Scales' bytes [N, K / group] in the kernels' order: by strip, block of K, row, group, and half of the rows."""
    n, groups = scale.shape
    each = BLOCK_K // group
    parts = scale.view(n // STRIP, 2, STRIP // 2, groups // each, each)
    return parts.permute(0, 3, 2, 4, 1).contiguous()


def _parts(q: torch.Tensor) -> torch.Tensor:
    """q by strip, unit of K, row, pair, instruction, half of the pair, half of the instruction's K, half of the rows:
    the last two are a register."""
    n, k = q.shape
    return q.view(n // 16, 2, 8, k // 64, 4, 2, 4, 2).permute(0, 3, 2, 6, 4, 7, 5, 1)


def _four(q: torch.Tensor) -> torch.Tensor:
    parts = _parts(q)
    return parts[..., 0] | (parts[..., 1] << 4)


def _floats(q: torch.Tensor) -> torch.Tensor:
    import torch

    parts = _parts(q).flatten(-2).to(torch.int16)
    made = torch.zeros_like(parts[..., 0])
    for register, (mantissa, exponent, sign) in enumerate(_PLACES):
        held = parts[..., register]
        signs = (held.flip(-1) if register == 1 else held) >> 3
        made |= (held & 1) << mantissa | (held >> 1 & 3) << exponent | signs << sign
    return made.contiguous().view(torch.uint8)


def _eight(q: torch.Tensor) -> torch.Tensor:
    n, k = q.shape
    # By strip, half of the rows, row, unit of K, instruction, half of the instruction's K, pair, half of the pair.
    parts = q.view(n // STRIP, 2, STRIP // 2, k // 64, 4, 2, 4, 2)
    return parts.permute(0, 3, 1, 2, 6, 4, 7, 5)
