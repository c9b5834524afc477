"""Products with packed weights of 4 or 8 bits: compiles and launches packed*.cu, which state the order.

x [M, K], bias [N] or none and out [M, N] are bf16 or fp16, and bf16 with floats e2m1. Weights: kernels/packing.py. The
order is that of kernels/triton/gemm.py for the dequantized weights. Wide forms need Hopper.
"""

from __future__ import annotations

import functools
from ctypes import c_int, c_longlong, c_void_p
from typing import TYPE_CHECKING, NamedTuple

from ..packing import BLOCK_K, MIDDLE, STRIP, Packed, has_whole
from . import nvrtc

if TYPE_CHECKING:
    import torch

# The bits of 1, and of the float to whose mantissa an integer is added (packing.BASE).
_BITS = {"torch.bfloat16": (0x3F80, 0x4300), "torch.float16": (0x3C00, 0x6400)}
_OF_FLOATS = "torch.bfloat16"  # x, with floats e2m1
_ROW_BYTES = 2 * BLOCK_K + 16
_DEQUANTIZING_WARPS = 8
_HOPPER = 9, 0
_ROW_OF_EXPERTS = 8  # bytes: a row's id and factor
_FEWEST = 4  # a tile of experts may be multiplied as its fourth part
_SPAN = 16  # tiles of experts whose rows and weights are in the cache at once
_LARGE = 64  # rows of a wide form's tile that may serve any number of tiles


class Form(NamedTuple):
    """What the source is compiled for. warps: of a block, with 16 rows of w each. tiles: eights of rows of x. stages:
    of blocks of 128 elements of K in shared memory. wide: packed_wide.cu, else packed.cu, or with stages of
    several blocks and of experts packed_lean.cu. blocks: of a stage of packed_lean.cu and packed_few.cu. halves:
    packed_few.cu, where two warps share 16 rows of w and tiles is 1 or 2. bits: of integers, 4 or 8; of experts 4."""

    warps: int
    tiles: int
    stages: int
    wide: bool = False
    blocks: int = 1
    halves: bool = False
    bits: int = 4

    @property
    def lean(self) -> bool:
        """Whether the form is of packed_lean.cu also for dense products."""
        return self.blocks > 1 and not self.wide and not self.halves

    @property
    def strips(self) -> int:
        """How many times 16 rows of w a block of threads has."""
        return self.warps // (1 + self.halves)

    def whole_stages(self, depth: int) -> Form:
        """This form, or one whose stages have one block, if `depth` elements of K are not whole stages."""
        if depth // BLOCK_K % self.blocks:
            return self._replace(blocks=1, stages=self.stages * self.blocks)
        return self

    def serves(self, rows: int) -> bool:
        """Whether this form can be the fastest for a number of rows."""
        tile = 8 * self.tiles
        if self.wide:
            return tile < 2 * rows and (rows <= 2 * tile or tile >= _LARGE)
        return rows <= tile and (tile < 2 * rows or self.tiles == 1)

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether the form may serve on a device of this compute capability. Wide forms need Hopper. There, for 9 rows
        and more, the only others that may be faster have stages of several blocks."""
        hopper = tuple(capability) == _HOPPER
        return hopper if self.wide else self.tiles == 1 or self.blocks > 1 or not hopper

    def defines(
        self, groups: int, zeros: bool, dtype: str, experts: bool = False, floats: bool = False, tail: bool = False
    ) -> dict[str, object]:
        """The preprocessor macros of the source. groups: of scales in 128 elements of K. dtype: of x. tail: of experts,
        whether x ends inside of the weights' last block of K."""
        one, base = _BITS[dtype]
        return {
            "PARTS": 1,
            "BITS": self.bits,
            "BRAIN": int(dtype == "torch.bfloat16"),
            "WIDE": int(self.wide),
            "WARPS": self.warps,
            "TILES": self.tiles,
            "STAGES": self.stages,
            "BLOCKS": self.blocks,
            "GROUPS": max(1, groups),
            "LONG": int(not groups),
            "ZEROS": int(zeros),
            "E2M1": int(floats),
            "EXPERTS": int(experts),
            "TAIL": int(tail),
            "WHOLE": int(floats and has_whole(BLOCK_K // groups, experts)),
            "LEAST": max(1, self.tiles // _FEWEST),
            "ONE": f"{one * 0x10001:#x}u",
            "BASE": f"{base * 0x10001:#x}u",
            "MIDDLE": f"{(base + MIDDLE[self.bits]) * 0x10001:#x}u",
        }

    def shared_bytes(self, groups: int, zeros: bool, experts: bool = False, floats: bool = False) -> int:
        """Bytes of shared memory of a block. groups: of scales in 128 elements of K."""
        rows = 8 * self.tiles * _ROW_OF_EXPERTS if experts else 0
        own = self.strips * (STRIP * BLOCK_K * self.bits // 8 + (16 if floats else 32) * max(1, groups) * (1 + zeros))
        if self.wide:
            return self.stages * -(-(8 * self.tiles * 2 * BLOCK_K + own) // 1024) * 1024 + rows
        return self.stages * self.blocks * (8 * self.tiles * _ROW_BYTES + own)


# Forms that may serve. A certificate compares and times them.
FORMS = (
    Form(2, 1, 8),
    Form(4, 1, 8),
    Form(8, 1, 6),
    Form(2, 1, 4, blocks=2, halves=True),
    Form(4, 1, 4, blocks=2, halves=True),
    Form(2, 1, 2, blocks=4),
    Form(2, 1, 3, blocks=4),
    Form(4, 1, 2, blocks=4),
    Form(8, 1, 2, blocks=2),
    Form(4, 2, 2, blocks=4),
    Form(2, 2, 8),
    Form(4, 2, 6),
    Form(8, 2, 6),
    Form(2, 4, 6),
    Form(4, 4, 6),
    Form(8, 4, 5),
    Form(2, 8, 4),
    Form(4, 8, 4),
    Form(8, 8, 4),
    Form(4, 2, 8, True),
    Form(8, 2, 8, True),
    Form(4, 4, 8, True),
    Form(8, 4, 6, True),
    Form(4, 8, 8, True),
    Form(8, 8, 6, True),
    Form(16, 8, 5, True),
    Form(4, 16, 5, True),
    Form(8, 16, 5, True),
    Form(16, 16, 4, True),
    *(
        form._replace(bits=8)
        for form in (
            Form(4, 1, 6),
            Form(2, 1, 6, blocks=2, halves=True),
            Form(4, 1, 3, blocks=4, halves=True),
            Form(2, 2, 5, blocks=2, halves=True),
            Form(4, 2, 4, blocks=2, halves=True),
            Form(8, 2, 3, blocks=2, halves=True),
            Form(2, 1, 3, blocks=4),
            Form(4, 1, 3, blocks=2),
            Form(8, 1, 2, blocks=2),
            Form(8, 2, 2, blocks=2),
            Form(2, 2, 6),
            Form(4, 2, 6),
            Form(2, 4, 5),
            Form(4, 4, 4),
            Form(2, 8, 4),
            Form(4, 8, 3),
            Form(4, 4, 6, True),
            Form(4, 8, 6, True),
            Form(8, 8, 5, True),
            Form(16, 8, 4, True),
            Form(4, 16, 5, True),
            Form(8, 16, 4, True),
        )
    ),
)


# Forms that may serve experts, where an expert has few rows of its own.
FORMS_OF_EXPERTS = (
    Form(4, 1, 2, blocks=2),
    Form(4, 2, 2, blocks=2),
    Form(8, 8, 4, True),
    Form(16, 16, 4, True),
    Form(4, 1, 2, blocks=4),
    Form(4, 2, 2, blocks=4),
)
_MOST_IDS = (7, 14, 60)  # of an expert in the mean, of each of the first three forms
_DEEP = 6144  # from this K on, the first two forms get longer stages: the last two


class Rows(NamedTuple):
    """The rows of each expert, sorted as by vLLM's moe_align_block_size with block_size = 8 * form.tiles.

    An id is a row of out; id // each is the row of x. sorted_ids: int32 [S], ids in tiles of block_size; in a tile, ids
    are of one expert, and ids that are not below `ids` fill the end. experts: int32 [tiles], each tile's expert, or -1:
    out gets zeros. padded: int32 [1], on the device, how many of sorted_ids count; a multiple of block_size. each:
    ids of one row of x. ids: how many ids there are. weights: fp32 [ids], by which the sums are multiplied, or None.
    """

    sorted_ids: torch.Tensor
    experts: torch.Tensor
    padded: torch.Tensor
    each: int
    ids: int
    weights: torch.Tensor | None = None


def form_of_experts(ids: int, experts: int, n: int, k: int) -> Form:
    """The form that serves `ids` ids spread over `experts` experts of weights [n, k]. Every form has the same bits. The
    products of one layer get one number of tiles."""
    number = sum(ids > most * experts for most in _MOST_IDS)
    if number < 2 and k >= _DEEP and k // BLOCK_K % FORMS_OF_EXPERTS[number + 4].blocks == 0:
        number += 4
    return FORMS_OF_EXPERTS[number]


def groups(group: int) -> int:
    """How many groups of scales 128 elements of K have. 0: a group has more elements."""
    return BLOCK_K // group


@functools.cache
def build(
    form: Form,
    groups: int,
    zeros: bool,
    dtype: str,
    arch: str,
    major: int,
    experts: bool = False,
    floats: bool = False,
    tail: bool = False,
) -> bytes:
    """Compile a cubin for `arch` (e.g. sm_90) with NVRTC of CUDA `major`. Raises nvrtc.CompileError."""
    brain = dtype == "torch.bfloat16"
    product, file = "", "packed_lean.cu" if experts or form.lean else "packed_few.cu" if form.halves else "packed.cu"
    if form.wide:
        used = {form.tiles // part for part in ((1, 2, _FEWEST) if experts else (1,))} - {0}
        product, file = "".join(map(multiply_wide, sorted(used))), "packed_wide.cu"
        arch += "a"  # instructions of this architecture alone
    source = nvrtc.source("primitives.h") + product + nvrtc.source("unpack.h", "rows.h", file)
    defines = form.defines(groups, zeros, dtype, experts, floats, tail) | {"CONTRACT": 1}
    return nvrtc.compile(source, arch, defines | {"INPUT": '"bf16"' if brain else '"f16"'}, major)


def multiply_wide(tiles: int) -> str:
    """CUDA source of multiply_wide: d [64, 8 * tiles] += a [64, 16] b [8 * tiles, 16].T, by one instruction wgmma.

    a: this thread's registers, as those of mma.m16n8k16 for its warp's 16 rows. b: its descriptor (primitives.h).
    """
    sums = [f"d[{tile}][{part}]" for tile in range(tiles) for part in range(4)]
    held = ", ".join(f"%{i}" for i in range(len(sums)))
    given = ", ".join(f"%{len(sums) + i}" for i in range(4))
    out, at = ", ".join(f'"+f"({name})' for name in sums), len(sums) + 4
    return f"""
DEVICE void multiply_wide(float (&d)[{tiles}][4], const u32 (&a)[4], i64 b) {{
  asm volatile("{{\\n\\t.reg .pred adds;\\n\\tsetp.ne.b32 adds, 1, 0;\\n\\t"
               "wgmma.mma_async.sync.aligned.m64n{8 * tiles}k16.f32." INPUT "." INPUT
               " {{{held}}}, {{{given}}}, %{at}, adds, 1, 1, 0;\\n\\t}}"
               : {out}
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}
"""


@functools.cache
def _kernel(
    name: str,
    form: Form,
    groups: int,
    zeros: bool,
    dtype: str,
    device: int,
    experts: bool = False,
    floats: bool = False,
    tail: bool = False,
) -> nvrtc.Function:
    import torch

    cubin = build(form, groups, zeros, dtype, *nvrtc.target(device), experts, floats, tail)
    shared = form.shared_bytes(groups, zeros, experts, floats) if name == "product" else form.warps * 16 * _ROW_BYTES
    with torch.cuda.device(device):
        return nvrtc.Function(cubin, name, 32 * form.warps, shared)


def fits(form: Form, group: int, zeros: bool, shared: int, experts: bool = False, floats: bool = False) -> bool:
    """Whether a form's block fits into `shared` bytes of shared memory."""
    return form.shared_bytes(groups(group), zeros, experts, floats) <= shared


def prepare(
    form: Form,
    group: int,
    zeros: bool,
    dtype: torch.dtype,
    device: int,
    experts: bool = False,
    floats: bool = False,
    tail: bool = False,
) -> None:
    """Compile a form, so that its first launch finds it ready. Raises nvrtc.CompileError."""
    build(form, groups(group), zeros, str(dtype), *nvrtc.target(device), experts, floats, tail)


def product(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, form: Form) -> torch.Tensor:
    """x [M, K] @ w.T (+ bias [N]) -> [M, N], from x aligned to 16 bytes, without gaps in K."""
    import torch

    rows, depth = x.shape
    cols = packed.scale.shape[1]
    _check_rows(x)
    out = torch.empty((rows, cols), dtype=x.dtype, device=x.device)
    if not rows:
        return out
    zeros, floats = packed.zero is not None, packed.floats
    _check_type(x, packed)
    _check_bits(packed, form.bits)
    form = form.whole_stages(depth)
    held = _kernel("product", form, groups(packed.group), zeros, str(x.dtype), x.device.index, False, floats)
    tensors = (x, packed.data, packed.scale, packed.zero, bias, out)
    sizes = (rows, cols, depth, packed.group, x.stride(0))
    arguments = [*(c_void_p(None if t is None else t.data_ptr()) for t in tensors), *map(c_int, sizes)]
    arguments.append(c_void_p(packed.whole.data_ptr() if floats else None))
    grid = -(-cols // (16 * form.strips)), -(-rows // (8 * form.tiles))
    held(grid[::-1] if form.wide else grid, torch.cuda.current_stream(x.device).cuda_stream, arguments)
    return out


def _check_type(x: torch.Tensor, packed: Packed) -> None:
    if packed.floats and str(x.dtype) != _OF_FLOATS:
        raise ValueError(f"packed: no exact product of floats of 4 bits and {x.dtype}")


def _check_bits(packed: Packed, bits: int) -> None:
    if packed.bits != bits:
        raise ValueError(f"packed: a form for weights of {bits} bits does not take {packed.bits} bits")


def _check_rows(x: torch.Tensor) -> None:
    if x.stride(1) != 1 or x.data_ptr() % 16 or x.stride(0) * 2 % 16:
        raise ValueError(f"packed: the kernel does not take rows of strides {x.stride()}")


def dequantize(packed: Packed) -> torch.Tensor:
    """The weights w [N, K] in the type of the scales, of floats e2m1 in bf16."""
    import torch

    n, k = packed.shape
    device, floats = packed.data.device, packed.floats
    out = torch.empty((n, k), dtype=torch.bfloat16 if floats else packed.scale.dtype, device=device)
    form, zeros = Form(_DEQUANTIZING_WARPS, 1, 2, bits=packed.bits), packed.zero is not None
    held = _kernel("dequantize", form, groups(packed.group), zeros, str(out.dtype), device.index, False, floats)
    tensors = (packed.data, packed.scale, packed.zero, out)
    arguments = [*(c_void_p(None if t is None else t.data_ptr()) for t in tensors), *map(c_int, (n, k, packed.group))]
    units = n // 16 * (k // BLOCK_K)
    held((-(-units // form.warps), 1), torch.cuda.current_stream(device).cuda_stream, arguments)
    return out


def product_of_experts(
    x: torch.Tensor, packed: Packed, rows: Rows, bias: torch.Tensor | None, form: Form, out: torch.Tensor
) -> None:
    """out[id] = round((x[id // each] @ w[e].T + bias[e]) * weights[id]) for each id of each expert e, in one launch.

    x: [M, K], bf16 or fp16, aligned to 16 bytes, without gaps in K. packed: of experts, of x's type, or floats e2m1;
    K may be x's up to the next multiple of 128, and what x lacks counts as zeros. `whole` multiplies a sum before the
    bias is added. bias: [E, N] of x's type or None. out: [ids, N] of x's type, contiguous. A row whose expert is -1
    gets zeros; a row without an entry in rows.sorted_ids stays as before. The host waits for nothing, so the launch may
    be captured in a CUDA graph.
    """
    import torch

    _check_rows(x)
    tiles = rows.sorted_ids.numel() // (8 * form.tiles)
    if not tiles:
        return
    cols, depth = packed.shape
    rest = x.shape[1] - depth + BLOCK_K
    if not 0 < rest <= BLOCK_K or rest % 8:
        raise ValueError(f"packed: the kernel does not take rows of {x.shape[1]} for weights {packed.shape} of experts")
    if (packed.whole is not None) != (packed.floats and has_whole(packed.group, True)):
        raise ValueError(f"packed: {'a' if packed.whole is not None else 'no'} number `whole` of these experts")
    _check_type(x, packed)
    _check_bits(packed, form.bits)
    if out.shape != (rows.ids, cols) or not out.is_contiguous() or out.data_ptr() % 16:
        raise ValueError(f"packed: the kernel does not write {tuple(out.shape)} with strides {out.stride()}")
    zeros, tail = packed.zero is not None, rest < BLOCK_K
    form = form if tail else form.whole_stages(depth)
    given = groups(packed.group), zeros, str(x.dtype), x.device.index, True, packed.floats, tail
    held = _kernel("product", form, *given)
    tensors = (x, packed.data, packed.scale, packed.zero, bias, out)
    sizes = (x.shape[0], cols, depth, packed.group, x.stride(0))
    arguments = [*(c_void_p(None if t is None else t.data_ptr()) for t in tensors), *map(c_int, sizes)]
    of_rows = (rows.sorted_ids, rows.experts, rows.padded, rows.weights)
    arguments += [c_void_p(None if t is None else t.data_ptr()) for t in of_rows]
    inverse = -(-(1 << 32) // rows.each)  # the product of an id and the inverse, over 2**32, is id // each
    # The kernel counts ids in 32 bits, and places in x in parts of 16 bytes.
    if rows.ids * rows.each >= 1 << 32 or x.shape[0] * (x.stride(0) // 8) >= 1 << 31:
        raise ValueError(
            f"packed: the kernel does not take {rows.ids} ids of {x.shape[0]} rows of {x.shape[1]} elements"
        )
    arguments += [c_longlong(inverse), *map(c_int, (rows.ids, tiles, depth // packed.group, rest))]
    arguments += [] if packed.whole is None else [c_void_p(packed.whole.data_ptr())]
    span = min(tiles, _SPAN)
    grid = span, -(-cols // (16 * form.warps)), -(-tiles // span)
    held(grid, torch.cuda.current_stream(x.device).cuda_stream, arguments)
