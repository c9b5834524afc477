"""Parts of the operations on CUDA that need no GPU: routes, certificates' data, tiles, and replaced globals."""

import msgspec
import pytest
import torch

from bi_patch.ops import certificates, zero_sums
from bi_patch.ops.cuda import cublaslt, linear, machine, moe
from bi_patch.ops.cuda.ahead import Ahead
from bi_patch.seams.overlay import Overlay, with_globals


class Library:
    """A fake vendor. It offers first FEW up to 40 rows and MANY above, then ANY. For 13 rows it offers nothing."""

    def __init__(self):
        self.asked = []

    def offers(self, rows):
        self.asked.append(rows)
        kinds = () if rows == 13 else (FEW if rows <= 40 else MANY, ANY)
        return [cublaslt.Algorithm(None, None, None, kind) for kind in kinds]


FEW, MANY, ANY = (cublaslt.Kind(i, 0, 1, 0, 0, 0, 0, 0) for i in (1, 2, 3))


@pytest.mark.parametrize(
    "kinds,served",
    [
        ((FEW, MANY), range(1, 61)),
        ((FEW,), range(1, 41)),
        ((MANY,), range(41, 61)),
        ((), ()),
    ],
)
def test_only_algorithms_that_passed_serve_and_only_up_to_the_limit(kinds, served):
    library = Library()
    route = linear.Route(frozenset(kinds), 60, False, library)
    for _ in range(2):
        assert [m for m in range(1, 90) if route.algorithm(m) is not None] == [m for m in served if m != 13]
    assert sorted(library.asked) == list(range(1, 61))  # once each


@pytest.mark.parametrize("kinds,preferred_serves", [((FEW, MANY, ANY), True), ((FEW, MANY), False)])
def test_the_preferred_algorithm_serves_where_it_passed(kinds, preferred_serves):
    route = linear.Route(frozenset(kinds), 60, False, Library(), {8: FEW, 20: ANY})
    served = {m: route.algorithm(m).kind for m in range(1, 61) if m != 13}
    fast = ANY if preferred_serves else FEW
    assert served == {m: FEW if m <= 8 else fast if m <= 20 else FEW if m <= 40 else MANY for m in served}


def test_the_rows_that_are_asked_for():
    assert linear.asked_rows(5) == [1, 2, 3, 4, 5]
    asked = linear.asked_rows(16384)
    assert asked[:1024] == list(range(1, 1025)) and asked[-1] == 16384 and len(asked) < 3300
    assert {m % 64 for m in asked[1024:]} == set(range(64))  # every remainder of every alignment up to 64


class Bits:
    """A fake of linear.Trial. It has offers of three kinds; the kinds in `wrong` give other bits."""

    mixed = False

    def __init__(self, monkeypatch, wrong=()):
        self.problem, self.wrong, self.made = PROBLEM, wrong, 0
        monkeypatch.setattr(linear, "Trial", lambda problem, rows: self)
        monkeypatch.setattr(linear, "_key", lambda *_: KEY)
        monkeypatch.setattr(linear.machine, "vendor_allowed", lambda: True)
        monkeypatch.setattr(cublaslt, "Gemm", lambda *_: Library())
        monkeypatch.setattr(linear, "_routes", {})
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def offers(self):
        self.made += 1
        library = Library()
        return {m: library.offers(m) for m in linear.asked_rows(60)}

    def times(self, offers):
        return {m: [10.0, 9.0] if m == 32 else [10.0, 9.9] for m in (1, 8, 16, 32)}

    def vendor_differs(self, m, algorithm):
        return 5 if algorithm.kind in self.wrong else 0

    def tiles_agree(self):
        return True


KEY = certificates.Key("cuda.linear", "N=8 K=8", "a GPU", "a library", "kernels", linear.DATA)
PROBLEM = linear.Problem(8, 8, torch.bfloat16, False)


def test_times_are_kept_so_that_a_second_start_takes_none(monkeypatch, tmp_path):
    trial = Bits(monkeypatch)
    (first,) = linear.certify([PROBLEM], 60, tmp_path)
    once = linear.routes()[PROBLEM]
    (again,) = linear.certify([PROBLEM], 60, tmp_path)
    assert trial.made == 1 and first == again and first.passed
    assert first.preferred == {m: list(ANY if m == 32 else FEW) for m in (1, 8, 16, 32)}
    assert first.algorithms == [list(FEW), list(MANY), list(ANY)]
    assert first.microseconds["first offer"]["32"] == 10 and first.microseconds["fastest offer"]["32"] == 9
    again = linear.routes()[PROBLEM]
    for m in (1, 16, 17, 32, 33, 41, 60):
        assert again.algorithm(m).kind == once.algorithm(m).kind == (ANY if 16 < m <= 32 else FEW if m <= 40 else MANY)


def test_what_the_library_offers_is_asked_once(monkeypatch, tmp_path):
    library = Library()
    monkeypatch.setattr(linear, "_key", lambda *_: KEY)
    monkeypatch.setattr(linear.machine, "vendor_allowed", lambda: True)
    monkeypatch.setattr(cublaslt, "Gemm", lambda *_: library)
    monkeypatch.setattr(linear, "_asked", {})
    ahead = Ahead()
    monkeypatch.setattr(ahead, "rehearse", lambda call: None)
    linear.rehearse(PROBLEM, 60, tmp_path, ahead)
    ahead.finish()
    trial = object.__new__(linear.Trial)
    trial.problem, trial.rows, trial.gemm = PROBLEM, 60, library
    first = trial.offers()
    assert library.asked == linear.asked_rows(60) == list(first)
    again = trial.offers()  # another trial of the problem asks anew
    assert [[o.kind for o in offers] for offers in again.values()] == [[o.kind for o in of] for of in first.values()]
    assert len(library.asked) == 120


def test_what_was_asked_is_forgotten_where_memory_lets_fewer_rows_be_compared(monkeypatch, tmp_path):
    Bits(monkeypatch)  # its offers are its own, as those of fewer rows are
    monkeypatch.setattr(linear, "_asked", {(PROBLEM, 60): {}, (PROBLEM, 70): {}})
    linear.certify([PROBLEM], 60, tmp_path)
    assert list(linear._asked) == [(PROBLEM, 70)]
    route = linear.routes()[PROBLEM]
    assert route.algorithm(61) is route.algorithm(10**6) is None and not {61, 10**6} & set(route._chosen)


def test_a_preferred_algorithm_with_other_bits_does_not_serve(monkeypatch, tmp_path):
    Bits(monkeypatch, wrong={ANY})
    (certificate,) = linear.certify([PROBLEM], 60, tmp_path)
    assert not certificate.passed and certificate.evidence.differing and "algorithm (3," in certificate.evidence.first
    assert certificate.algorithms == [list(FEW), list(MANY)]
    assert not {17, 32} & set(certificate.passed_rows) and {1, 40, 60} <= set(certificate.passed_rows)
    assert {linear.routes()[PROBLEM].algorithm(m).kind for m in range(14, 41)} == {FEW}


def test_certificates_of_an_older_choice_are_made_again(monkeypatch, tmp_path):
    trial = Bits(monkeypatch)
    old = msgspec.structs.replace(KEY, data="sums of zero and others")
    evidence = certificates.Evidence([1, 60], 8, 0)
    certificates.save(tmp_path, certificates.Certificate(old, "cublaslt", True, [1, 60], evidence, 0.1, "2026-01-01"))
    linear.certify([PROBLEM], 60, tmp_path)
    assert trial.made == 1


class Timer:
    """A fake of bi_patch.ops.cuda.timing.

    One call takes `us` microseconds per row. Timed in ways, a call takes a microsecond per row, plus its way's place in
    the list.
    """

    def __init__(self, us):
        self.us, self.ways = us, {}

    def once(self, call):
        return self.us * len(call.args[1])

    def microseconds(self, ways, replays):
        rows = len(ways[0][0].args[1])
        self.ways[rows] = [[call.args[2].data_ptr() for call in calls] for calls in ways]
        return [float(rows + i) for i in range(len(ways))]


def timed(monkeypatch, cache_bytes, copies, us=1.0, offered=2):
    """The times of a trial of 600 rows and a weight of 512 bytes, and the timer."""
    timer = Timer(us)
    monkeypatch.setattr(linear, "timing", timer)
    monkeypatch.setattr(linear.machine, "cache_bytes", lambda: cache_bytes)
    trial = object.__new__(linear.Trial)
    trial.rows, trial.copies, trial.bias, trial.gemm = 600, copies, None, None
    trial.x, trial.weight = torch.zeros(600, 16), torch.zeros(8, 16)
    offers = {m: Library().offers(m)[:offered] for m in linear.asked_rows(600)}
    return trial.times(offers), timer


def test_timed_calls_go_over_more_weights_than_the_cache_holds(monkeypatch):
    times, timer = timed(monkeypatch, cache_bytes=1024, copies=4)
    assert list(times) == [1, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 600]
    assert times[8] == [8, 9]
    for ways in timer.ways.values():
        assert len(ways) == 2 and ways[0] == ways[1] and len(set(ways[0])) == 5
        assert ways[0] == ways[0][:5] * (len(ways[0]) // 5)
    # Calls for about 150 us, at most 128 calls, and at least one call per weight.
    assert [len(timer.ways[m][0]) for m in (1, 8, 64, 600)] == [125, 20, 5, 5]


def test_a_weight_larger_than_the_cache_needs_no_copy(monkeypatch):
    _, timer = timed(monkeypatch, cache_bytes=255, copies=0)
    assert len(set(timer.ways[1][0])) == 1 and len(timer.ways[1][0]) == 128


def test_nothing_is_timed_without_memory_or_a_choice_or_where_calls_are_slow(monkeypatch):
    assert not timed(monkeypatch, cache_bytes=1024, copies=3)[0]
    assert not timed(monkeypatch, cache_bytes=1024, copies=4, offered=1)[0]
    assert list(timed(monkeypatch, cache_bytes=1024, copies=4, us=20.0)[0]) == [1, 8, 16, 32, 64]


def ordered(a, b, size):
    """a [M, K] @ b [N, K].T in fp32: the products of each block of `size` are added in order, then the blocks."""
    total = 0
    for k in range(0, a.shape[1], size):
        block = torch.zeros(a.shape[0], b.shape[0])
        for i in range(k, min(k + size, a.shape[1])):
            block += a[:, i, None].float() * b[None, :, i].float()
        total = total + block
    return total


@pytest.mark.parametrize("k", [64, 65, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_compared_sums_are_zero_and_leave_their_order(dtype, k):
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(k, generator=generator)
    x = zero_sums.cancelling(5, order, 1, generator, dtype)
    w = zero_sums.cancelling(40, order, -1, generator, dtype)
    assert x.shape == (5, k) and x.is_contiguous() and x.dtype == dtype
    assert float((x.double() @ w.double().T).abs().max()) < 1e-9
    if k == 4096:
        one, other = ordered(x, w, k), ordered(x, w, 32)
        assert float((one.to(dtype) != other.to(dtype)).float().mean()) > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_experts_data_shows_another_order_of_either_product(dtype):
    problem = moe.Problem(4, 256, 1024, 2, dtype)
    x, w13, w2 = moe.operands(problem, 8, torch.Generator().manual_seed(3))
    assert w13.shape == (4, 512, 1024) and w2.shape == (4, 1024, 256) and w13.stride(0) == w2.stride(0) == 0

    def product(a, b, split):
        return ordered(a, b, a.shape[1] // split).to(dtype)

    def expert(first, second):
        gate, up = product(x, w13[0], first).chunk(2, -1)
        return product((torch.nn.functional.silu(gate.float()) * up.float()).to(dtype), w2[0], second)

    want = expert(1, 1)
    assert bool(want.isfinite().all()) and float((want != 0).float().mean()) > 0.8
    for first, second, share in ((2, 1, 0.8), (1, 2, 0.3)):
        assert float((expert(first, second) != want).float().mean()) > share


@pytest.mark.parametrize("shared", [49152, 101376, 166912, 232448])
@pytest.mark.parametrize("size", [2, 4])
def test_tiles_fit_the_shared_memory(shared, size):
    gemm = pytest.importorskip("bi_patch.kernels.triton.gemm", reason="triton is not installed")
    for rows in (1, 16, 17, 64, 128, 300, 5000):
        for cols in (128, 2048, 4096, 24576):
            ((tile, end),) = gemm.choose(rows, cols, 4096, size, shared, 132, False)
            assert end == cols
            assert (tile.m + tile.n) * tile.k * size * tile.stages <= shared or tile.stages == 2
            assert not tile.persistent


def test_columns_that_fill_no_wave_get_tiles_of_their_own():
    gemm = pytest.importorskip("bi_patch.kernels.triton.gemm", reason="triton is not installed")
    first, rest = gemm.choose(384, 6144, 4096, 2, 232448, 132, True)
    assert (first.tile.m, first.tile.n, first.end, rest.end) == (128, 128, 44 * 128, 6144)
    assert rest.tile.m * rest.tile.n < 128 * 128
    for rows in (33, 64, 192, 700, 5000):
        for cols in (64, 1000, 6144, 151936):
            parts = gemm.choose(rows, cols, 4096, 2, 232448, 132, True)
            ends = [part.end for part in parts]
            assert ends == sorted(set(ends)) and ends[-1] == cols and all(end % 8 == 0 for end in ends[:-1])


def test_tiles_never_split_k():
    assert moe.one_pass({"BLOCK_SIZE_M": 16, "SPLIT_K": 4})["SPLIT_K"] == 1


def test_the_bundled_table_of_experts_never_splits_k():
    import json

    files = list(moe._TABLES.glob("moe-*.json"))
    assert files
    for file in files:
        table = json.loads(file.read_text())
        assert all(int(m) > 0 and tile["SPLIT_K"] == 1 for m, tile in table.items())


LIMIT = 3


def limited(x, *, factor=1):
    return min(x, LIMIT) * factor


def test_replaced_globals_leave_the_original_alone():
    other = with_globals(limited, LIMIT=10)
    assert (limited(7, factor=2), other(7, factor=2)) == (6, 14)
    with pytest.raises(NameError, match="ABSENT"):
        with_globals(limited, ABSENT=1)


def test_an_overlay_shows_the_original_behind_it():
    overlay = Overlay(torch, topk="ours")
    assert overlay.topk == "ours"
    assert overlay.argmax is torch.argmax


def test_experts_in_groups_have_tiles_of_one_group_and_data_with_a_spread():
    problem = moe.Problem(4, 384, 256, 2, torch.bfloat16, group=128)
    assert problem.table == (4, 384, moe.FP8) and problem.fixed == moe.FIXED_GROUPS and "groups of 128" in str(problem)
    assert problem.fixed["BLOCK_SIZE_K"] == 128
    x, (w13, scale13), (w2, scale2) = moe.operands(problem, 8, torch.Generator().manual_seed(3))
    assert x.dtype == torch.bfloat16 and w13.dtype == w2.dtype == torch.float8_e4m3fn
    assert w13.shape == (4, 768, 256) and scale13.shape == (4, 6, 2) and scale2.shape == (4, 2, 3)
    assert w13.stride(0) == scale2.stride(0) == 0
    assert 10 < float(w13[0].float().std()) < 20 and len(scale13[0].unique()) == 12
    few = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 64, "SPLIT_K": 2, "num_warps": 4}
    kept = {"BLOCK_SIZE_M": 16, "num_warps": 4, "SPLIT_K": 1}
    assert moe.one_pass(few, moe.FP8, 128) == kept | {"BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128}
    wide = few | {"BLOCK_SIZE_N": 256}  # a tile's columns have one scale for each group
    assert [moe.one_pass(wide, moe.FP8, group)["BLOCK_SIZE_N"] for group in (128, 0)] == [128, 256]
    assert moe.one_pass(few, moe.FP8) == kept | {"BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64}
    assert moe.one_pass(few) == moe.one_pass(few, "int4_w4a16", 128) == few | {"SPLIT_K": 1}


@pytest.mark.parametrize(
    ("scale", "shapes"),
    [(moe.ROW, ((4, 768, 1), (4, 256, 1))), (moe.EXPERT, ((4,), (4,))), (moe.EXPERT_AND_ROW, ((4,), (4,)))],
)
def test_experts_without_groups_have_a_scale_for_each_row_or_expert(scale, shapes):
    problem = moe.Problem(4, 384, 256, 2, torch.bfloat16, scale=scale)
    assert problem.table == (4, 384, moe.FP8) and problem.fixed == moe.FIXED and f"e4m3 by {scale}" in str(problem)
    x, (w13, scale13), (w2, scale2) = moe.operands(problem, 8, torch.Generator().manual_seed(3))
    assert x.dtype == torch.bfloat16 and w13.dtype == w2.dtype == torch.float8_e4m3fn
    assert (scale13.shape, scale2.shape) == shapes and scale13.dtype == torch.float32
    assert len(scale13[0].unique()) == (768 if scale == moe.ROW else 1) and len(scale2.unique()) > 3


def test_what_a_kind_of_experts_is_called():
    """The name is a part of a certificate's key: another way to compute must have another name."""
    made = moe.Problem(4, 384, 256, 2, torch.bfloat16, bias=True)
    assert str(made) == "E=4 N=384 K=256 top2 silu bias bfloat16"
    ends = [str(made._replace(bias=False, **form)).split("silu ")[1] for form in ({"group": 128}, {"scale": moe.ROW})]
    assert ends == ["e4m3 groups of 128 bfloat16", f"e4m3 by {moe.ROW}, swapped by tile bfloat16"]


def test_a_package_whose_kernels_serve_is_a_part_of_a_row_certificates_key(monkeypatch):
    from bi_patch.ops.cuda import machine, rows
    from bi_patch.ops.row_checks import RowCheck

    for name in ("device", "libraries", "kernels_digest"):
        monkeypatch.setattr(machine, name, lambda name=name: name)
    keys = [
        rows._key(RowCheck("o", "p", (1,), None, None, library=library), "vllm 1").libraries
        for library in ("", "humming-kernels 0.1.19")
    ]
    assert keys == ["vllm 1 libraries", "vllm 1 humming-kernels 0.1.19 libraries"]


def test_a_variable_that_chooses_the_librarys_kernels_is_a_part_of_a_certificates_key(monkeypatch):
    monkeypatch.setattr(cublaslt, "version", lambda: 1)
    monkeypatch.setattr(machine, "_driver_version", lambda: 1)
    found = machine.libraries.__wrapped__
    plain = found()
    for name, value in (("NVIDIA_TF32_OVERRIDE", "1"), ("CUBLAS_EMULATION_STRATEGY", "performant")):
        monkeypatch.setenv(name, value)
        assert f"{name}={value}" in found() and plain in found()
