"""Packed weights of 4 and 8 bits: where each integer lies, and that the kernel compiles for every architecture."""

import ctypes
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bi_patch.kernels import packing
from bi_patch.kernels.cuda import nvrtc, packed

N, K = 48, 256
KERNELS = Path(__file__).resolve().parents[4] / "kernels" / "cuda"
LAUNCH = """
extern "C" void launch_product(int x, int y, const u16* rows, const unsigned char* w, const unsigned char* scale,
                               const unsigned char* zero, const u16* bias, u16* out, int m, int n, int k, int group,
                               int stride, const float* whole) {
  run_grid(x, y, THREADS, [&] { product(rows, w, scale, zero, bias, out, m, n, k, group, stride, whole); });
}
"""
LAUNCH_DEQUANTIZE = """
extern "C" void launch_dequantize(int x, int y, const unsigned char* w, const Scale* scale, const u16* zero, u16* out,
                                  int n, int k, int group) {
  run_grid(x, y, THREADS, [&] { dequantize(w, scale, zero, out, n, k, group); });
}
"""


def emulated(folder, form, groups, zeros, floats=False):
    """The kernels, compiled by g++ over emulated instructions."""
    source, library = folder / "packed.cpp", folder / "packed.so"
    few = "packed_lean.cu" if form.lean else "packed_few.cu" if form.halves else "packed.cu"
    kernel = "packed_wide.cu" if form.wide else few
    dequantizing = LAUNCH_DEQUANTIZE if kernel == "packed.cu" else ""
    files = ("emulate.h", *(KERNELS / name for name in ("unpack.h", "rows.h", kernel)))
    included = "".join(f'#include "{file}"\n' for file in files)
    source.write_text(f"{included}{LAUNCH}{dequantizing}")
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas"]
    command += [f"-I{Path(__file__).parent}", str(source), "-o", str(library)]
    macros = form.defines(groups, zeros, "torch.bfloat16", False, floats)
    command += [f"-D{name}={value}" for name, value in macros.items()]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def run_emulated(monkeypatch, library, form):
    def kernel(name, *_):
        return lambda grid, stream, arguments: getattr(library, f"launch_{name}")(*grid, *arguments)

    monkeypatch.setattr(packed, "_kernel", kernel)
    monkeypatch.setattr(packed, "_DEQUANTIZING_WARPS", form.warps)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))


@pytest.mark.parametrize(
    ("form", "rows", "n", "group", "zeros", "bias"),
    [
        (packed.Form(2, 1, 3), 5, 48, 128, True, True),
        (packed.Form(4, 2, 4), 40, 80, 64, False, False),
        (packed.Form(1, 4, 2), 29, 32, 32, True, False),
        (packed.Form(2, 1, 8), 1, 32, 512, False, True),
        (packed.Form(4, 1, 2, blocks=2), 5, 48, 32, True, True),
        (packed.Form(2, 2, 2, blocks=4), 40, 80, 512, True, False),
        (packed.Form(8, 1, 2, blocks=4), 8, 144, 128, False, True),
        (packed.Form(2, 1, 3, blocks=2, halves=True), 5, 48, 128, True, True),
        (packed.Form(4, 1, 2, blocks=2, halves=True), 13, 80, 32, True, False),
        (packed.Form(8, 1, 2, blocks=2, halves=True), 8, 80, 256, False, True),
        (packed.Form(4, 2, 3, True), 5, 48, 128, True, True),
        (packed.Form(4, 4, 4, True), 40, 80, 64, False, False),
        (packed.Form(8, 2, 5, True), 17, 144, 32, True, False),
        (packed.Form(4, 1, 3, True), 1, 32, 512, False, True),
        (packed.Form(2, 2, 3, blocks=2, halves=True), 29, 80, 64, True, True),
        (packed.Form(2, 1, 3, bits=8), 5, 48, 128, True, True),
        (packed.Form(4, 2, 4, bits=8), 40, 80, 32, False, False),
        (packed.Form(4, 1, 2, blocks=2, bits=8), 5, 48, 32, True, True),
        (packed.Form(2, 2, 3, blocks=4, bits=8), 40, 80, 512, False, False),
        (packed.Form(2, 1, 3, blocks=2, halves=True, bits=8), 5, 48, 128, True, True),
        (packed.Form(4, 2, 2, blocks=4, halves=True, bits=8), 29, 80, 512, False, True),
        (packed.Form(4, 2, 3, True, bits=8), 5, 48, 128, True, True),
        (packed.Form(8, 4, 4, True, bits=8), 40, 144, 64, False, False),
        (packed.Form(4, 4, 5, True, bits=8), 29, 80, 512, True, False),
    ],
)
def test_products_and_weights(tmp_path, monkeypatch, form, rows, n, group, zeros, bias):
    generator = torch.Generator().manual_seed(rows)
    k = 512
    bits = form.bits
    q = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    q[0, :2], q[-1, -2:] = torch.tensor([0, 2**bits - 1]), torch.tensor([2 ** (bits - 1), 2 ** (bits - 1) - 1])
    scale = (torch.rand((n, k // group), generator=generator) * 0.01 + 0.002).mul_(8 / 2 ** (bits - 1)).bfloat16()
    zero = torch.randint(0, 2**bits, (n, k // group), generator=generator, dtype=torch.uint8) if zeros else None
    if zeros:
        zero[0, 0], zero[-1, -1] = 2**bits - 1, 0
    middle = zero.float().repeat_interleave(group, 1) if zeros else 2 ** (bits - 1)
    weight = ((q.float() - middle) * scale.float().repeat_interleave(group, 1)).bfloat16()
    held = packing.pack(q, scale, zero, bits)

    run_emulated(monkeypatch, emulated(tmp_path, form, packed.groups(group), zeros), form)
    if not (form.wide or form.halves or form.lean):
        assert torch.equal(packed.dequantize(held), weight)
    x = torch.randn(rows, k, generator=generator).bfloat16()
    added = torch.randn(n, generator=generator).bfloat16() if bias else None
    got = packed.product(x, held, added, form)
    want = x.double() @ weight.double().T + (added.double() if bias else 0)
    torch.testing.assert_close(got.double(), want, atol=2e-2, rtol=1e-2)
    if rows > 1:
        assert torch.equal(packed.product(x[3:4].clone(), held, added, form), got[3:4])


def scales_of(n, k, group, generator):
    """Scales of NVFP4 (groups of 16) or MXFP4 (groups of 32), with zeros and, of NVFP4, negative and the smallest."""
    if group == 32:
        return torch.exp2(torch.randint(-22, 9, (n, k // group), generator=generator).float())
    scale = torch.randn((n, k // group), generator=generator).mul(32).clamp(-448, 448)
    scale[0, :4] = torch.tensor([0, 2**-9, 448, 3 * 2**-9])
    return scale.to(torch.float8_e4m3fn)


def value_of(q):
    return torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[q.long() & 7] * torch.where(q > 7, -1, 1)


@pytest.mark.parametrize(
    ("form", "rows", "n", "group", "bias"),
    [
        (packed.Form(2, 1, 3), 5, 48, 16, True),
        (packed.Form(4, 2, 4), 40, 80, 32, False),
        (packed.Form(4, 1, 2, blocks=2), 5, 48, 32, True),
        (packed.Form(2, 2, 2, blocks=4), 40, 80, 16, False),
        (packed.Form(2, 1, 3, blocks=2, halves=True), 5, 48, 16, True),
        (packed.Form(4, 1, 2, blocks=2, halves=True), 13, 80, 32, False),
        (packed.Form(8, 1, 2, blocks=2, halves=True), 8, 80, 16, True),
        (packed.Form(4, 2, 3, True), 5, 48, 16, True),
        (packed.Form(8, 2, 5, True), 17, 144, 32, True),
        (packed.Form(4, 4, 4, True), 40, 80, 16, False),
    ],
)
def test_floats_of_4_bits(tmp_path, monkeypatch, form, rows, n, group, bias):
    generator = torch.Generator().manual_seed(rows)
    k = 512
    q = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    scale, whole = scales_of(n, k, group, generator), torch.tensor(0.0123)
    exact = value_of(q).double() * scale.double().repeat_interleave(group, 1)
    held = packing.pack_floats(q, scale, whole)
    assert held.shape == (n, k) and held.group == group and held.data.dtype == held.scale.dtype == torch.uint8

    run_emulated(monkeypatch, emulated(tmp_path, form, packed.groups(group), False, True), form)
    if not (form.wide or form.halves or form.lean):
        assert torch.equal(packed.dequantize(held).double(), exact * 2**-7)  # without any rounding
    x = torch.randn(rows, k, generator=generator).bfloat16()
    added = (torch.randn(n, generator=generator) * 10).bfloat16() if bias else None
    got = packed.product(x, held, added, form)
    want = x.double() @ exact.T * whole.double() + (added.double() if bias else 0)
    assert (got.double() - want).norm() / want.norm() < 4e-3
    if rows > 1:
        assert torch.equal(packed.product(x[3:4].clone(), held, added, form), got[3:4])
    with pytest.raises(ValueError, match="no exact product of floats of 4 bits and torch.float16"):
        packed.product(x.half(), held, added, form)


def test_scales_without_a_byte_are_refused():
    q = torch.zeros((N, K), dtype=torch.uint8)
    for wrong in (float("nan"), float("inf"), 2.0**-23, 2.0**9, 1 + 2**-4):
        scale = torch.ones(N, K // 16)
        scale[3, 3] = wrong
        with pytest.raises(ValueError, match="a scale of floats of 4 bits is not finite, or out of range"):
            packing.pack_floats(q, scale, torch.tensor(1.0))
    for n, k, group in ((40, 256, 16), (48, 192, 16), (48, 256, 64)):
        with pytest.raises(ValueError, match=f"cannot pack {n} x {k} floats of 4 bits in groups of {group}"):
            packing.pack_floats(torch.zeros((n, k), dtype=torch.uint8), torch.ones(n, k // group), torch.tensor(1.0))


def unpacked(data, n, k, bits):
    """The integers [N, K] by the definition of the fragments of mma.m16n8k16, element by element."""
    words = data.view(-1, 4).to(torch.int64)
    words = (words << torch.tensor([0, 8, 16, 24])).sum(1)
    q = torch.zeros(n, k, dtype=torch.int64)
    for at, word in enumerate(words.tolist()):
        rest, step = divmod(at, 4)
        rest, lane = divmod(rest, 32)
        rest, below = divmod(rest, bits // 4)  # below: of 8 bits, the half of a strip's rows
        strip, unit = divmod(rest, k // 64)
        for register in range(4) if bits == 4 else (below, below + 2):
            shift = 4 * register if bits == 4 else 8 * (register // 2)
            for half in range(2):
                row = strip * 16 + lane // 4 + 8 * (register % 2)
                column = unit * 64 + step * 16 + lane % 4 * 2 + half + 8 * (register // 2)
                q[row, column] = word >> (shift + 16 * half) & (2**bits - 1)
    return q


@pytest.mark.parametrize(("bits", "base"), [(4, (128, 1024)), (8, (-128, -128))])
def test_each_integer_lies_where_its_lane_finds_it(bits, base):
    q = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
    scale = torch.rand(N, 2).bfloat16()
    zero = torch.randint(0, 2**bits, (N, 2), dtype=torch.uint8)
    held = packing.pack(q, scale, zero, bits)
    assert held.shape == (N, K) and held.group == 128 and held.data.dtype == torch.uint8
    assert torch.equal(unpacked(held.data, N, K, bits), q.long())
    assert torch.equal(held.scale, scale.T) and torch.equal(held.zero.long() - base[0], zero.T.long())
    assert packing.pack(q, scale.half(), None, bits).zero is None
    assert (packing.pack(q, scale.half(), zero, bits).zero.long() - base[1] == zero.T.long()).all()


@pytest.mark.parametrize(("n", "k", "bits", "group"), [(40, 256, 4, 128), (48, 192, 4, 64), (48, 256, 3, 128)])
def test_other_sizes_are_refused(n, k, bits, group):
    assert not packing.covers(n, k, bits, group)
    with pytest.raises(ValueError, match=f"cannot pack {n} x {k} of {bits} bits"):
        packing.pack(torch.zeros(n, k, dtype=torch.uint8), torch.ones(n, k // group), None, bits)
    assert not packing.covers(48, 256, 4, 16) and not packing.covers(48, 384, 4, 96) and packing.covers(48, 384, 8, 384)


def test_every_form_fits_into_a_block_of_hopper():
    for form in packed.FORMS:
        assert packed.fits(form, 32, True, 232448), form
        assert form.bits == 8 or packed.fits(form, 16, False, 232448, False, True), form
        assert form.serves(8 * form.tiles) and (form.tiles == 1 or not form.serves(4 * form.tiles - 1))
        assert form.wide or not form.serves(65)
        outputs = 8 * form.tiles * (32 * form.warps + 16)  # they pass through shared memory
        assert not form.wide or outputs <= form.shared_bytes(1, False) and form.stages >= 3
        assert not form.wide or form.warps % 4 == 0
        assert form.blocks == 1 or form.whole_stages(512) == form and form.whole_stages(384).blocks == 1
        assert form.whole_stages(384).shared_bytes(4, True) == form.shared_bytes(4, True)
    for capability, most in (((8, 0), 64), ((9, 0), 4096), ((10, 0), 64)):
        for bits in (4, 8):
            able = [form for form in packed.FORMS if form.bits == bits and form.runs_on(capability)]
            assert all(any(form.serves(m) for form in able) for m in range(1, most + 1))
            assert any(form.wide for form in able) == (capability == (9, 0))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float16"])
def test_the_kernel_compiles(architecture, dtype):
    try:
        nvrtc.library(13)
    except nvrtc.CompileError:
        pytest.skip("NVRTC is not installed")
    few = [form for form in packed.FORMS if not form.wide and form.bits == 4]
    halves = next(form for form in few if form.halves)
    wide = [form for form in packed.FORMS if form.wide and form.bits == 4 and architecture == "sm_90"]
    lean = next(form for form in few if form.lean)
    for form, groups, zeros in (
        (few[0], 1, True),
        (lean, 2, True),
        (lean, 0, False),
        (halves, 2, True),
        (halves._replace(blocks=1), 0, False),
        (few[-1], 4, False),
        *((form, 4, True) for form in wide[::6]),
    ):
        assert packed.build(form, groups, zeros, dtype, architecture, 13)
        assert packed.build(form._replace(bits=8, stages=3), groups, zeros, dtype, architecture, 13)
        if dtype == "torch.bfloat16":
            assert packed.build(form, 8, False, dtype, architecture, 13, False, True)
