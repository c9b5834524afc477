"""Grouped products with packed weights of experts: each row gets its expert's product, whatever the other rows are."""

from ctypes import c_int
from types import SimpleNamespace

import pytest
import torch

from bi_patch.kernels import packing
from bi_patch.kernels.cuda import nvrtc, packed

PARAMETERS = (
    "const u16* x, const unsigned char* w, const unsigned char* scale, const unsigned char* zero, const u16* bias,"
    "u16* out, int rows, int cols, int depth, int group, int stride"
)
OF_ONE = ", const float* whole"
OF_EXPERTS = (
    ", const int* ids, const int* experts, const int* padded, const float* factors, i64 inverse, int limit,"
    "int tiles, int scales, int rest"
)


@pytest.fixture
def launched(emulated, monkeypatch, tmp_path):
    """launched(form, group, zeros): from then on packed's products run emulated. launched.grids: of the launches."""
    built = {}

    def use(form, group, zeros):
        def kernel(name, form, groups, zeros, dtype, device, experts=False, floats=False, tail=False):
            key = form, groups, zeros, experts, floats, tail
            wholes = floats and groups == 8  # the experts have a number each
            if key not in built:
                folder = tmp_path / str(len(built))
                folder.mkdir()
                built[key] = emulated(
                    folder,
                    "packed_wide" if form.wide else "packed_lean" if experts else "packed",
                    {"product": PARAMETERS + OF_EXPERTS * experts + OF_ONE * (not experts or wholes)},
                    form.defines(groups, zeros, dtype, experts, floats, tail),
                    ("unpack.h", "rows.h"),
                )
            run = built[key].run_deep_product if experts else built[key].run_product
            return lambda grid, stream, arguments: run(*map(c_int, grid), *arguments)

        monkeypatch.setattr(packed, "_kernel", kernel)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))

    return use


def made(experts, n, k, group, zeros, bias):
    """Packed weights of experts, and bias or None."""
    generator = torch.Generator().manual_seed(n + group)
    q = torch.randint(0, 16, (experts, n, k), generator=generator, dtype=torch.uint8)
    scale = (torch.rand((experts, n, k // group), generator=generator) * 0.01 + 0.002).bfloat16()
    zero = torch.randint(0, 16, scale.shape, generator=generator, dtype=torch.uint8) if zeros else None
    added = torch.randn((experts, n), generator=generator).bfloat16() if bias else None
    return packing.pack_experts(q, scale, zero), added


def one_of(held, expert):
    """The packed weights of one expert."""
    experts = len(held.scale)
    return held._replace(
        data=held.data.view(experts, -1)[expert].clone(),
        scale=held.scale[expert],
        zero=None if held.zero is None else held.zero[expert],
    )


def sort(chosen, tile, elsewhere=()):
    """What moe_align_block_size gives for the expert of each id: ids by expert, padded to tiles, and unused tiles."""
    ids, experts = [], []
    for expert in sorted(set(chosen)):
        own = [i for i, of in enumerate(chosen) if of == expert]
        own += [len(chosen)] * (-len(own) % tile)
        ids += own
        experts += [-1 if expert in elsewhere else expert] * (len(own) // tile)
    padded = torch.tensor([len(ids)], dtype=torch.int32)
    ids += [123456789] * (2 * tile + 3)  # what lies beyond is read, and never followed
    experts += [987654321] * 3
    return torch.tensor(ids, dtype=torch.int32), torch.tensor(experts, dtype=torch.int32), padded


CHOSEN = {
    "ragged": [3, 0, 3, 3, 0, 3, 3, 3, 0, 3, 3, 3, 3, 0],  # experts 1 and 2 have no rows
    "single": [2, 1],
    "many": [i % 7 % 4 for i in range(46)],
}


@pytest.mark.parametrize(
    ("form", "case", "n", "group", "zeros", "bias", "share", "factors"),
    [
        (packed.Form(2, 1, 3), "ragged", 48, 128, True, True, 2, False),
        (packed.Form(4, 1, 2, blocks=2), "single", 80, 32, False, False, 2, True),
        (packed.Form(2, 1, 3, blocks=2), "many", 32, 64, True, True, 1, True),
        (packed.Form(4, 2, 2, blocks=2), "ragged", 48, 32, True, True, 2, True),
        (packed.Form(4, 1, 2, blocks=4), "ragged", 80, 256, True, False, 1, False),  # K has no four blocks
        (packed.Form(4, 1, 3, True), "ragged", 80, 64, True, False, 1, True),
        (packed.Form(4, 2, 3, True), "single", 64, 256, False, True, 1, False),
        (packed.Form(4, 4, 4, True), "ragged", 48, 128, False, True, 2, True),
        (packed.Form(8, 2, 4, True), "many", 144, 32, True, True, 2, True),
    ],
)
def test_each_row_gets_its_experts_product(launched, form, case, n, group, zeros, bias, share, factors):
    chosen, k = CHOSEN[case], 256
    held, added = made(4, n, k, group, zeros, bias)
    launched(form, group, zeros)
    ids = len(chosen)
    x = torch.randn(ids // share, k).bfloat16()
    by = 2.0 ** torch.randint(-3, 3, (ids,)) if factors else None  # rounding after the sum's factor changes no bit
    elsewhere = {0} if case == "ragged" else set()
    rows = packed.Rows(*sort(chosen, 8 * form.tiles, elsewhere), share, ids, by)
    out = torch.full((ids, n), torch.nan).bfloat16()
    packed.product_of_experts(x, held, rows, added, form, out)
    for expert in set(chosen):
        mine = torch.tensor([i for i, of in enumerate(chosen) if of == expert])
        bias_of = None if added is None else added[expert]
        want = packed.product(x[mine // share].clone(), one_of(held, expert), bias_of, form)
        if factors:
            want = want * by[mine, None].bfloat16()
        assert torch.equal(out[mine], torch.zeros_like(want) if expert in elsewhere else want), expert


def floats_of(experts, n, k, bias):
    """As `made`, of floats e2m1 with exponents, and the weights in fp64 [E, n, k]."""
    generator = torch.Generator().manual_seed(n + k)
    q = torch.randint(0, 16, (experts, n, k), generator=generator, dtype=torch.uint8)
    exponent = torch.randint(98, 129, (experts, n, k // 32), generator=generator, dtype=torch.uint8)
    exponent[:, 1::2] = torch.randint(117, 121, exponent[:, 1::2].shape, generator=generator, dtype=torch.uint8)
    q[0, 3, :32], exponent[0, 3, 0] = 8, 3  # the exponent of zeros, of either sign, does not count
    value = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)[q.long() & 7] * torch.where(q > 7, -1, 1)
    added = torch.randn((experts, n), generator=generator).bfloat16() if bias else None
    weight = value * torch.exp2(exponent.double() - 127).repeat_interleave(32, 2)
    return packing.pack_float_experts(q, exponent), added, weight


@pytest.mark.parametrize(
    ("form", "case", "n", "k", "bias", "share", "factors"),
    [
        (packed.Form(2, 1, 3), "ragged", 48, 256, True, 2, False),
        (packed.Form(2, 1, 3), "ragged", 48, 160, True, 2, True),
        (packed.Form(4, 1, 2, blocks=2), "many", 80, 512, False, 2, False),
        (packed.Form(4, 1, 2, blocks=2), "single", 80, 288, False, 2, True),
        (packed.Form(4, 2, 2, blocks=2), "many", 48, 352, True, 1, False),
        (packed.Form(4, 1, 2, blocks=4), "ragged", 80, 672, True, 1, True),  # two stages, the last of two blocks
        (packed.Form(4, 1, 3, True), "ragged", 80, 160, False, 1, True),
        (packed.Form(8, 2, 4, True), "many", 144, 256, True, 2, True),
        (packed.Form(8, 4, 4, True), "ragged", 144, 352, True, 2, False),
    ],
)
def test_floats_of_experts(launched, form, case, n, k, bias, share, factors):
    chosen = CHOSEN[case]
    held, added, exact = floats_of(4, n, k, bias)
    padded = held.shape[1]
    assert padded == -(-k // 128) * 128 and held.scale.shape == (4, padded // 32, n) and held.floats
    launched(form, 32, False)
    ids = len(chosen)
    x = torch.randn(ids // share, k).bfloat16()
    by = 2.0 ** torch.randint(-3, 3, (ids,)) if factors else None
    rows = packed.Rows(*sort(chosen, 8 * form.tiles), share, ids, by)
    out = torch.full((ids, n), torch.nan).bfloat16()
    packed.product_of_experts(x, held, rows, added, form, out)
    wide = torch.nn.functional.pad(x, (0, padded - k))
    for expert in set(chosen):
        mine = torch.tensor([i for i, of in enumerate(chosen) if of == expert])
        bias_of = None if added is None else added[expert]
        own = one_of(held, expert)._replace(whole=torch.tensor(1.0))
        want = packed.product(wide[mine // share].clone(), own, bias_of, form)
        double = x[mine // share].double() @ exact[expert].T + (0 if bias_of is None else bias_of.double())
        assert (want.double() - double).norm() < 4e-3 * double.norm()
        assert torch.equal(out[mine], want * by[mine, None].bfloat16() if factors else want), expert
    lost = x.clone()
    lost[0] = torch.nan  # beside the end of other rows
    again = torch.full((ids, n), torch.nan).bfloat16()
    packed.product_of_experts(lost, held, rows, added, form, again)
    assert again[:share].isnan().all() and torch.equal(again[share:], out[share:])


def scaled_of(experts, n, k, bias):
    """As `floats_of`, with scales in e4m3 and a number of each expert."""
    generator = torch.Generator().manual_seed(n + k)
    q = torch.randint(0, 16, (experts, n, k), generator=generator, dtype=torch.uint8)
    scale = torch.randint(1, 127, (experts, n, k // 16), generator=generator, dtype=torch.uint8)
    scale[0, 3, 0], scale[0, 5, 1] = 0, 128 + 60  # zero, and a negative scale
    scale = scale.view(torch.float8_e4m3fn)
    whole = 2.0 ** -torch.arange(6.0, 6.0 + experts)  # a power of two: the products of both are exact
    value = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)[q.long() & 7] * torch.where(q > 7, -1, 1)
    added = torch.randn((experts, n), generator=generator).bfloat16() if bias else None
    weight = value * scale.double().repeat_interleave(16, 2) * whole.double()[:, None, None]
    return packing.pack_scaled_experts(q, scale, whole), added, weight


@pytest.mark.parametrize(
    ("form", "case", "n", "k", "bias", "share", "factors"),
    [
        (packed.Form(2, 1, 3), "ragged", 48, 256, True, 2, True),
        (packed.Form(4, 1, 2, blocks=2), "many", 80, 512, False, 2, False),
        (packed.Form(4, 2, 2, blocks=2), "ragged", 48, 256, False, 1, True),
        (packed.Form(4, 1, 2, blocks=4), "single", 80, 512, False, 1, True),
        (packed.Form(4, 1, 3, True), "ragged", 80, 128, False, 1, True),
        (packed.Form(8, 2, 4, True), "many", 144, 256, True, 2, True),
        (packed.Form(8, 4, 4, True), "ragged", 144, 384, False, 2, False),
    ],
)
def test_scaled_floats_of_experts(launched, form, case, n, k, bias, share, factors):
    chosen = CHOSEN[case]
    held, added, exact = scaled_of(4, n, k, bias)
    assert held.shape == (n, k) and held.scale.shape == (4, k // 16, n) and held.whole.shape == (4,)
    launched(form, 16, False)
    ids = len(chosen)
    x = torch.randn(ids // share, k).bfloat16()
    by = 2.0 ** torch.randint(-3, 3, (ids,)) if factors else None
    rows = packed.Rows(*sort(chosen, 8 * form.tiles), share, ids, by)
    out = torch.full((ids, n), torch.nan).bfloat16()
    packed.product_of_experts(x, held, rows, added, form, out)
    for expert in set(chosen):
        mine = torch.tensor([i for i, of in enumerate(chosen) if of == expert])
        bias_of = None if added is None else added[expert]
        own = one_of(held, expert)._replace(whole=held.whole[expert])
        want = packed.product(x[mine // share].clone(), own, bias_of, form)
        double = x[mine // share].double() @ exact[expert].T + (0 if bias_of is None else bias_of.double())
        assert (want.double() - double).norm() < 4e-3 * double.norm()
        assert torch.equal(out[mine], want * by[mine, None].bfloat16() if factors else want), expert


def test_a_number_of_each_expert_multiplies_the_fp32_sum(launched):
    form, n, k = packed.Form(2, 1, 3), 32, 128
    held, _, _ = scaled_of(2, n, k, False)
    launched(form, 16, False)
    x, rows = torch.randn(2, k).bfloat16(), packed.Rows(*sort([0, 1], 8), 1, 2, torch.tensor([0.7, 0.3]))
    out, sums = torch.zeros(2, n).bfloat16(), torch.zeros(2, n, dtype=torch.bfloat16)
    third = held._replace(whole=torch.tensor([1 / 3, 3.0]) * 2.0**7)
    packed.product_of_experts(x, third, rows, None, form, out)
    for expert in range(2):
        own = one_of(third, expert)._replace(whole=third.whole[expert])
        sums[expert] = packed.product(x[expert : expert + 1].clone(), own, None, form)
    exact = out.double()
    near = sums.double() * rows.weights.double()[:, None]  # rounded twice: to 16 bits before the router's weight
    assert (exact - near).abs().max() <= 2**-7 * near.abs().max() and not torch.equal(exact, near.bfloat16().double())


def test_scaled_floats_of_experts_that_have_no_packing_are_refused(launched):
    held, _, _ = scaled_of(2, 32, 128, False)
    form, q = packed.Form(2, 1, 3), torch.ones((2, 32, 128), dtype=torch.uint8)
    launched(form, 16, False)
    scale, whole = torch.ones(2, 32, 8), torch.ones(2)
    for wrong in (torch.nan, torch.inf, 2.0**9, 2.0**-23):
        other = scale.clone()
        other[1, 7, 2] = wrong
        with pytest.raises(ValueError, match="not finite, or out of range"):
            packing.pack_scaled_experts(q, other, whole)
    for experts, n, k, group in ((0, 32, 128, 16), (2, 40, 128, 16), (2, 32, 192, 16), (2, 32, 128, 32)):
        given = torch.ones((experts, n, k), dtype=torch.uint8), torch.ones(experts, n, k // group), torch.ones(experts)
        with pytest.raises(ValueError, match=f"cannot pack {experts} experts of {n} x {k} floats of 4 bits"):
            packing.pack_scaled_experts(*given)
    x, rows, out = torch.zeros(2, 128).bfloat16(), packed.Rows(*sort([0, 1], 8), 1, 2), torch.zeros(2, 32).bfloat16()
    with pytest.raises(ValueError, match="no number `whole` of these experts"):
        packed.product_of_experts(x, held._replace(whole=None), rows, None, form, out)
    powers = packing.pack_float_experts(q, torch.full((2, 32, 4), 120, dtype=torch.uint8))
    with pytest.raises(ValueError, match="a number `whole` of these experts"):
        packed.product_of_experts(x, powers._replace(whole=whole), rows, None, form, out)


def test_floats_of_experts_that_have_no_packing_are_refused(launched):
    q, exponent = torch.full((2, 32, 160), 1, dtype=torch.uint8), torch.full((2, 32, 5), 120, dtype=torch.uint8)
    for wrong in (0, 97, 129, 254, 255):
        other = exponent.clone()
        other[1, 7, 2] = wrong
        with pytest.raises(ValueError, match=f"floats of 4 bits is {wrong}, and must be from 98 to 128"):
            packing.pack_float_experts(q, other)
    for experts, n, k in ((0, 32, 160), (2, 40, 160), (2, 32, 144)):
        with pytest.raises(ValueError, match=f"cannot pack {experts} experts of {n} x {k} floats of 4 bits"):
            packing.pack_float_experts(torch.zeros((experts, n, k), dtype=torch.uint8), exponent)
    assert packing.covers_float_experts(5760, 2880) and not packing.covers_float_experts(5760, 720)
    held = packing.pack_float_experts(q, exponent)
    form = packed.Form(2, 1, 3)
    launched(form, 32, False)
    rows, out = packed.Rows(*sort([0, 1], 8), 1, 2), torch.zeros(2, 32).bfloat16()
    for k in (128, 264):
        with pytest.raises(ValueError, match=rf"does not take rows of {k} for weights \(32, 256\)"):
            packed.product_of_experts(torch.zeros(2, k).bfloat16(), held, rows, None, form, out)
    with pytest.raises(ValueError, match="no exact product of floats of 4 bits and torch.float16"):
        packed.product_of_experts(torch.zeros(2, 160).half(), held, rows, None, form, out.half())


def test_what_the_kernel_does_not_take_is_refused(launched):
    held, _ = made(2, 32, 256, 128, False, False)
    form, ids = packed.Form(2, 1, 3), 2
    launched(form, 128, False)
    rows = packed.Rows(*sort([0, 1], 8), 1, ids)
    x, out = torch.randn(ids, 256).bfloat16(), torch.zeros(ids, 32).bfloat16()
    with pytest.raises(ValueError, match="does not take rows of strides"):
        packed.product_of_experts(x.T, held, rows, None, form, out)
    with pytest.raises(ValueError, match=r"does not write \(2, 16\)"):
        packed.product_of_experts(x, held, rows, None, form, out[:, :16])
    with pytest.raises(ValueError, match=r"does not take \d+ ids"):
        packed.product_of_experts(x, held, rows._replace(each=1 << 31), None, form, out)
    packed.product_of_experts(x, held, rows._replace(sorted_ids=rows.sorted_ids[:7]), None, form, out)
    assert not out.any()  # no tile
    with pytest.raises(ValueError, match="no experts to pack"):
        packing.pack_experts(torch.zeros((0, 32, 256)), torch.zeros((0, 32, 2)), None)


def test_forms_of_experts_fit_and_one_serves_every_number_of_ids():
    for form in packed.FORMS_OF_EXPERTS:
        assert packed.fits(form, 32, True, 232448, experts=True) and form.runs_on((9, 0)), form
        assert all(packed.fits(form, group, False, 232448, True, True) for group in (16, 32)), form
        outputs = 8 * form.tiles * (32 * form.warps + 16)  # they pass through shared memory
        assert not form.wide or outputs <= form.shared_bytes(1, False)
    for experts in (1, 8, 60, 128, 512):
        chosen = [packed.form_of_experts(ids, experts, 1536, 2048) for ids in range(1, 70_000, 97)]
        assert all(form in packed.FORMS_OF_EXPERTS for form in chosen)
        assert [form.tiles for form in chosen] == sorted(form.tiles for form in chosen)
        for n, k in ((4096, 14336), (7168, 6272)):  # each product of a layer has the same tiles
            others = [packed.form_of_experts(ids, experts, n, k) for ids in range(1, 70_000, 97)]
            assert [form.tiles for form in others] == [form.tiles for form in chosen]
            assert (others[0].blocks == 4) == (k == 14336)  # the other K has no four blocks


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float16"])
def test_the_kernel_of_experts_compiles(dtype):
    try:
        nvrtc.library(13)
    except nvrtc.CompileError:
        pytest.skip("NVRTC is not installed")
    for form in packed.FORMS_OF_EXPERTS[::2]:
        for groups, zeros in ((1, True), (4, False)):
            assert packed.build(form, groups, zeros, dtype, "sm_90", 13, True)
        if dtype == "torch.bfloat16":
            for groups, tail in ((4, False), (4, True), (8, False)):
                assert packed.build(form, groups, False, dtype, "sm_90", 13, True, True, tail)
