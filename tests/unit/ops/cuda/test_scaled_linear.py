"""Which kernel serves a linear of 8-bit floats. The kernels are stand-ins; no GPU is needed."""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bi_patch.errors import CertificateFailed
from bi_patch.ops.cuda import cublaslt, machine, scaled_linear
from bi_patch.ops.cuda.cublaslt import Algorithm, Kind
from bi_patch.ops.cuda.scaled_linear import Problem

KIND = Kind(1, 0, 1, 0, 0, 0, 0, 0)
EIGHTH = torch.float8_e4m3fn


class Library:
    """A stand-in of cublaslt.ScaledGemm: it offers one algorithm for each M, and keeps what it was called with."""

    def __init__(self, n, k, dtype, bias, group):
        self.n, self.k, self.dtype, self.bias, self.group = n, k, dtype, bias, group
        self.calls = []

    def offers(self, rows):
        return [Algorithm(None, None, None, KIND)]

    def __call__(self, *given):
        self.calls.append(given)


@pytest.fixture
def served(monkeypatch):
    """(problem, kinds that passed) -> the library of the problem's route, and the calls of the bundled kernel."""
    bundled = []
    monkeypatch.setattr(scaled_linear, "_routes", {})
    monkeypatch.setattr(scaled_linear, "_folded", {})
    monkeypatch.setattr(scaled_linear, "_units", [])
    monkeypatch.setattr(machine, "stream", lambda device: 0)

    def product(x, weight, x_scale, weight_scale, bias, dtype, tiles_agree):
        bundled.append((x_scale, weight_scale, tiles_agree))
        return torch.zeros(x.shape[0], weight.shape[0], dtype=dtype)

    monkeypatch.setattr(scaled_linear, "bundled", product)

    def route(problem, *kinds, preferred=None):
        library = Library(*problem[:5])
        scaled_linear._routes[problem] = scaled_linear.Route(
            frozenset(kinds), 64, True, library if kinds else None, preferred or {}
        )
        return library, bundled

    return route


def call(rows, scales=None, *, n=256, k=128, group=0, dtype=torch.bfloat16, static=False):
    x, w = torch.zeros(rows, k).to(EIGHTH), torch.zeros(n, k).to(EIGHTH)
    scales = scales or (torch.ones(rows, 1), torch.ones(n, 1))
    return scaled_linear.scaled_linear(x, w, *scales, None, group, dtype, static)


def test_a_certified_algorithm_serves_up_to_the_limit(served):
    library, bundled = served(Problem(256, 128, torch.bfloat16, False, 0), KIND)
    assert call(3).shape == (3, 256) and len(library.calls) == 1 and not bundled
    call(65)
    assert len(library.calls) == 1 and len(bundled) == 1


def test_without_a_passed_kind_the_bundled_kernel_serves(served):
    library, bundled = served(Problem(256, 128, torch.bfloat16, False, 0))
    call(3)
    assert not library.calls and bundled[0][2]
    call(3, n=128)  # a problem without a route: the reference
    assert not bundled[1][2]


def test_every_row_gets_a_scale(served):
    _, bundled = served(Problem(256, 128, torch.bfloat16, False, 0))
    call(3, (torch.full((1,), 2.0), torch.tensor(3.0)))
    x_scale, weight_scale, _ = bundled[0]
    assert x_scale.tolist() == [2.0] * 3 and weight_scale.tolist() == [3.0] * 256


def test_a_scale_of_the_checkpoint_is_multiplied_into_the_weights_once(served):
    _, bundled = served(Problem(256, 128, torch.bfloat16, False, 0, True))
    x_scale, weight_scale = torch.tensor(0.3), torch.rand(256)
    want = weight_scale * 0.3
    for rows in (1, 3):  # nothing is kept: the products are made in each call
        call(rows, (x_scale, weight_scale), static=True)
    scaled_linear.keep(x_scale, weight_scale, 256)
    scaled_linear._units.append(torch.ones(8))
    for rows in (1, 8, 9):
        call(rows, (x_scale, weight_scale), static=True)
    assert [ones.tolist() for ones, *_ in bundled] == [[1.0] * rows for rows in (1, 3, 1, 8, 9)]
    assert all(torch.equal(products, want) and used for _, products, used in bundled)
    kept = [products.data_ptr() for _, products, _ in bundled[2:]]
    assert len(set(kept)) == 1 and bundled[2][0].data_ptr() == bundled[3][0].data_ptr()


def test_kept_products_change_in_place(served):
    _, bundled = served(Problem(256, 128, torch.bfloat16, False, 0, True))
    scales = torch.tensor([0.5]), torch.tensor(2.0)
    scaled_linear.keep(*scales, 256)
    call(3, scales, static=True)
    scales[0].fill_(0.25)
    scaled_linear.keep(*scales, 256)
    call(3, scales, static=True)
    (_, before, _), (_, after, _) = bundled
    assert before.data_ptr() == after.data_ptr() and after.tolist() == [0.5] * 256
    other = torch.tensor([0.5]), scales[1]
    call(3, other, static=True)
    assert bundled[2][1].tolist() == [1.0] * 256 and len(scaled_linear._folded) == 1


def test_kept_products_serve_their_own_scales_alone(served):
    """Neither scales at an address that was freed, nor a layer of another size."""
    _, bundled = served(Problem(256, 128, torch.bfloat16, False, 0, True))
    scales = torch.tensor([0.5]), torch.tensor([2.0])
    scaled_linear.keep(*scales, 256)
    (held,) = scaled_linear._folded.values()
    assert all(kept is scale for kept, scale in zip(held, scales, strict=False))
    shared = tuple(torch.nn.Parameter(scale.data, requires_grad=False) for scale in scales)  # same memory, new tensors
    address = held[-1].data_ptr()
    del scales, held
    gc.collect()
    call(3, shared, static=True)
    assert bundled[0][1].data_ptr() == address  # what a captured graph reads
    call(3, shared, n=128, static=True)
    assert bundled[1][1].tolist() == [1.0] * 128


def test_vllms_kernel_serves_static_activations_only(served, monkeypatch):
    handed, called = scaled_linear._own(scaled_linear._HANDED), []
    run = scaled_linear.Kernel(lambda x, w, xs, ws, dtype: called.append((xs.tolist(), ws[0].item(), dtype)), 512, "1")
    monkeypatch.setattr(scaled_linear, "_handed", {True: run, False: None})
    by_row, static = Problem(256, 128, torch.bfloat16, False, 0), Problem(256, 128, torch.bfloat16, False, 0, True)
    assert scaled_linear._handed_to(by_row) is None and scaled_linear._handed_to(static) is run
    assert scaled_linear._handed_to(by_row._replace(group=128)) is None
    for problem in (by_row, static):
        served(problem, KIND, handed, preferred={64: handed})
    scaled_linear._routes[static].handed = run
    call(3)
    assert not called
    call(3, (torch.tensor(0.5), torch.tensor(4.0)), static=True)
    assert called == [([1.0] * 3, 2.0, torch.bfloat16)]


@pytest.mark.parametrize("given", [{"dtype": torch.float32}, {"group": 64}, {"group": 128, "static": True}])
def test_an_unknown_form_is_an_error(served, given):
    with pytest.raises(CertificateFailed, match="no invariant GEMM"):
        call(3, **given)


def test_the_library_is_asked_about_groups_of_four_rows_only():
    trial = object.__new__(scaled_linear._Trial)
    trial.rows, trial.problem, trial.bias_given = 2000, Problem(256, 128, torch.bfloat16, False, 128), False
    asked = trial.asked()
    assert asked[:3] == [4, 8, 12] and all(m % 4 == 0 for m in asked) and 1024 in asked and asked[-1] > 1900
    trial.bias_given = True
    assert trial.asked() == []


def test_scales_of_groups_lie_as_the_library_reads_them(served):
    library, _ = served(Problem(256, 256, torch.bfloat16, False, 128), KIND)
    scales = torch.arange(8.0).view(4, 2), torch.ones(2, 2)
    call(4, scales, k=256, group=128)
    (given,) = library.calls
    assert len(given) == 8 and given[5] is None
    trial = object.__new__(scaled_linear._Trial)
    trial.problem, trial.x, trial.x_scale = Problem(256, 256, torch.bfloat16, False, 128), torch.zeros(8, 256), None
    trial.x_scale = torch.arange(16.0).view(8, 2)
    rows, scale = trial.take(4, 4)
    assert rows.shape == (4, 256) and scale.t().is_contiguous() and scale.tolist() == trial.x_scale[4:].tolist()


def test_a_number_of_rows_that_four_does_not_divide_is_padded_for_the_library(served):
    library, _ = served(Problem(256, 256, torch.bfloat16, False, 128), KIND)
    out = call(3, (torch.ones(3, 2), torch.ones(2, 2)), k=256, group=128)
    assert len(library.calls) == 1 and out.shape == (3, 256)
    x, scale = scaled_linear._padded(torch.ones(3, 256).to(EIGHTH), torch.arange(6.0).view(3, 2), 4)
    assert x.shape == (4, 256) and scale.shape == (4, 2) and scale.t().is_contiguous()
    assert scale[:3].tolist() == [[0, 1], [2, 3], [4, 5]] and bool((x[:3].float() == 1).all())


def test_the_fastest_kernel_at_the_next_timed_number_of_rows_serves(served, monkeypatch):
    tile, handed = scaled_linear._own(scaled_linear._TILE, 2), scaled_linear._own(scaled_linear._HANDED)
    called = []
    monkeypatch.setattr(scaled_linear, "_variant", lambda number, *_: called.append(number))
    monkeypatch.setattr(scaled_linear, "_handed", {})
    problem = Problem(256, 128, torch.bfloat16, False, 128)
    library, bundled = served(problem, KIND, tile, handed, preferred={8: handed, 32: tile, 64: KIND})

    def scales(rows):
        return torch.ones(rows, 1), torch.ones(2, 1)

    run = scaled_linear.Kernel(lambda x, *_: called.append("handed"), 64, "1")
    call(4, scales(4), group=128)  # nothing was handed over: the library
    scaled_linear._routes[problem]._own_kinds.clear()
    scaled_linear._routes[problem].handed = run
    for rows in (1, 8, 9, 32, 33, 64):
        call(rows, scales(rows), group=128)
    assert called == ["handed", "handed", 2, 2] and len(library.calls) == 3 and not bundled


def test_a_kernel_that_did_not_agree_does_not_serve(served):
    tile = scaled_linear._own(scaled_linear._TILE, 2)
    library, bundled = served(Problem(256, 128, torch.bfloat16, False, 0), KIND, preferred={64: tile})
    call(9)
    assert len(library.calls) == 1 and not bundled


def test_what_a_problem_is_called():
    assert str(Problem(8, 16, torch.bfloat16, True, 0)) == "N=8 K=16 e4m3 by row bfloat16 bias"
    assert str(Problem(8, 128, torch.float16, False, 128)) == "N=8 K=128 e4m3 groups of 128 float16"
    assert str(Problem(8, 16, torch.float16, False, 0, True)) == "N=8 K=16 e4m3 static float16"
    assert scaled_linear._scale_sizes(Problem(200, 256, torch.bfloat16, False, 128), 5) == ((5, 2), (2, 2))


def test_a_key_tells_the_form(monkeypatch):
    for name in ("device", "libraries", "kernels_digest"):
        monkeypatch.setattr(machine, name, lambda *_: "none")
    forms = [(0, False), (0, True), (128, False)]
    keys = {scaled_linear._key(Problem(8, 128, torch.bfloat16, False, *form), 60).digest() for form in forms}
    assert len(keys) == 3
    assert cublaslt.ScaledGemm.__doc__


class OnCpu(TorchFunctionMode):
    """Tensors that would be made on a GPU are made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = dict(kwargs or {})
        return func(*args, **given | ({"device": "cpu"} if "cuda" in str(given.get("device")) else {}))


@pytest.mark.parametrize("static", [False, True])
def test_a_trial_of_static_activations_has_ones_as_scales_of_rows(served, monkeypatch, static):
    """As in a call: kernels that take the two scales in another order must agree there, too."""
    problem = Problem(16, 64, torch.bfloat16, False, 0, static)
    _, bundled = served(problem)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    monkeypatch.setattr(scaled_linear, "_gemm", lambda problem: None)
    monkeypatch.setattr(torch, "Generator", lambda device, made=torch.Generator: made("cpu"))
    with OnCpu():
        trial = scaled_linear._Trial(problem, 8)
    ((x_scale, weight_scale, _),) = bundled
    assert x_scale.shape == (8,) and (x_scale.unique().tolist() == [1.0]) is static
    assert weight_scale.shape == (16,) and len(weight_scale.unique()) > 1 and trial.x.shape == (8, 64)


@pytest.mark.parametrize(
    ("problem", "bias", "tried"),
    [
        (Problem(256, 128, torch.bfloat16, False, 128), False, True),
        (Problem(256, 128, torch.float16, False, 128), False, False),  # DeepGEMM gives bf16
        (Problem(256, 128, torch.float16, False, 0, True), False, True),
        (Problem(256, 128, torch.bfloat16, False, 0, True), True, False),
    ],
)
def test_vllms_kernel_is_tried_where_it_gives_the_type_and_adds_no_bias(monkeypatch, problem, bias, tried):
    monkeypatch.setattr(machine, "vendor_allowed", lambda: True)
    trial = object.__new__(scaled_linear._Trial)
    trial.problem, trial.bias_given, trial.handed = problem, bias, scaled_linear.Kernel(None, 64, "1")
    able = trial._candidates().get(scaled_linear._own(scaled_linear._HANDED))
    assert (able is not None) is tried
    assert able is None or (able(64) and not able(65))


def test_ones_for_every_number_of_rows_are_made_before_a_graph_is_captured(served, monkeypatch, tmp_path):
    """A captured graph has the address of the ones, so a call must not make them."""
    made = SimpleNamespace(algorithms=[])
    route = SimpleNamespace(kinds=frozenset(), limit=64, tiles_agree=True, gemm=None, preferred={})
    monkeypatch.setattr(scaled_linear.certificates, "obtain", lambda *_, **__: made)
    monkeypatch.setattr(scaled_linear.linear, "route", lambda *_: route)
    monkeypatch.setattr(scaled_linear, "_key", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "device", lambda *_: torch.zeros(1).device)
    static, by_row = (Problem(256, 128, torch.bfloat16, False, 0, static) for static in (True, False))
    for problems, rows, sizes in (([by_row], 40, []), ([by_row, static], 40, [40]), ([static], 30, [40])):
        scaled_linear.certify(problems, rows, tmp_path)
        assert [ones.tolist() for ones in scaled_linear._units] == [[1.0] * size for size in sizes]
    held = scaled_linear._units[0].data_ptr()
    assert scaled_linear._unit(7, scaled_linear._units[0].device).data_ptr() == held
