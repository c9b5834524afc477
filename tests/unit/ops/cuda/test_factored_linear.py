"""Linears whose sum one number multiplies: what a certificate notices, and which way then serves packed floats.

The library is a stand-in, which computes on the CPU; no GPU is needed.
"""

import ctypes

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bi_patch.errors import CertificateFailed
from bi_patch.kernels import packing
from bi_patch.ops import certificates
from bi_patch.ops.cuda import certify, cublaslt, factored_linear, linear, machine, packed_linear
from bi_patch.ops.cuda.cublaslt import Algorithm, Kind

N, K, ROWS = 32, 128, 24
KIND = Kind(1, 0, 1, 0, 0, 0, 0, 0)
PROBLEM = factored_linear.Problem(N, K, torch.bfloat16)


class Library:
    """A stand-in of cublaslt.FactoredGemm: it offers one algorithm for each M."""

    def __init__(self, n, k, dtype):
        self.n, self.k, self.dtype = n, k, dtype

    def offers(self, rows):
        return [Algorithm(None, None, None, KIND)]


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def sums(x, weight):
    """fp32 sums in ascending K, one product at a time: a row's bits depend on no other row."""
    total = torch.zeros(x.shape[0], weight.shape[0])
    for k in range(x.shape[1]):
        total += x[:, k, None].float() * weight[None, :, k].float()
    return total


def right(x, weight, whole, out):
    return (sums(x, weight) * whole).to(out.dtype)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Make this process look as if it had a GPU and had certified nothing. Returns a function that sets how the library
    computes: (x, weight, whole, out) -> the result."""
    make = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda *_: make())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for name in ("device", "libraries"):
        monkeypatch.setattr(machine, name, lambda: "none")
    monkeypatch.setattr(machine, "kernels_digest", lambda kind="triton": kind)
    monkeypatch.setattr(machine, "vendor_allowed", lambda: True)
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1 << 10)
    monkeypatch.setattr(cublaslt, "FactoredGemm", Library)
    monkeypatch.setattr(factored_linear, "_routes", {})
    monkeypatch.setattr(packed_linear, "_routes", {})
    monkeypatch.setattr(certificates, "_warned", set())
    monkeypatch.setattr(linear, "bundled", lambda x, weight, bias, agree, out=None: bundled(x, weight, out))
    held = {"compute": right}

    def vendor(gemm, algorithm, x, weight, whole, out=None):
        out = x.new_empty((x.shape[0], gemm.n)) if out is None else out
        return out.copy_(held["compute"](x, weight, whole, out))

    monkeypatch.setattr(factored_linear, "_vendor", vendor)
    with _OnCpu():
        yield lambda compute: held.update(compute=compute)


def bundled(x, weight, out):
    total = sums(x, weight)
    return total.to(x.dtype) if out is None else out.copy_(total)


def certified(tmp_path):
    (made,) = factored_linear.certify([PROBLEM], ROWS, tmp_path)
    return made


def test_a_product_in_the_order_passes_and_serves_from_17_rows_on(tmp_path):
    made = certified(tmp_path)
    assert made.passed and made.algorithms == [list(KIND)] and made.key.operation == "cuda.factored_linear"
    assert made.evidence.rows[0] == 17 and made.evidence.rows[-1] == ROWS
    assert made.evidence.compared == 2 * 2 * N * sum(made.evidence.rows)  # two numbers, at two places
    assert [m for m in range(40) if factored_linear.serves(PROBLEM, m)] == list(range(17, ROWS + 1))
    assert certified(tmp_path) == made


def rounded_first(x, weight, whole, out):
    return sums(x, weight).to(out.dtype) * whole


def flushed(x, weight, whole, out):
    found = sums(x, weight) * whole
    return torch.where(found.abs() < torch.finfo(torch.float32).tiny, found * 0, found).to(out.dtype)


def other_order(x, weight, whole, out):
    parts = (sums(x[:, at : at + K // 2], weight[:, at : at + K // 2]) for at in (0, K // 2))
    return (sum(parts) * whole).to(out.dtype)


def on_weights(x, weight, whole, out):
    return sums(x, (weight.float() * whole).to(weight.dtype)).to(out.dtype)


def reads_output(x, weight, whole, out):
    return torch.where(out.isnan(), out, right(x, weight, whole, out))  # as 0 * out, added


@pytest.mark.parametrize("wrong", [rounded_first, flushed, other_order, on_weights, reads_output])
def test_another_order_or_rounding_fails_and_does_not_serve(wrong, emulated, tmp_path):
    emulated(wrong)
    made = certified(tmp_path)
    assert not made.passed and made.evidence.differing and not made.algorithms
    assert not factored_linear.serves(PROBLEM, ROWS)


def test_a_product_without_a_certificate_is_an_error(tmp_path):
    x, weight, whole = torch.zeros(ROWS, K).bfloat16(), torch.zeros(N, K).bfloat16(), torch.tensor(2.0)
    with pytest.raises(CertificateFailed, match="cuda.factored_linear: N=32 K=128 bfloat16 times a number"):
        factored_linear.product(x, weight, whole)
    certified(tmp_path)
    assert factored_linear.product(x, weight, whole).shape == (ROWS, N)
    few, gaps, other = (x[:16], weight, whole), (x[:, ::2], weight, whole), (x, weight.float(), whole)
    for given in (few, gaps, other, (x, weight, x[0, 0])):
        with pytest.raises(CertificateFailed, match="no certificate"):
            factored_linear.product(*given)


def test_the_library_reads_the_number_on_the_device(monkeypatch):
    monkeypatch.undo()
    said, called = {}, []

    class Functions:
        def cublasLtMatmulDescSetAttribute(self, desc, attribute, value, size):
            said[attribute] = value._obj.value
            return 0

        def cublasLtMatmul(self, *given):
            called.append(given)
            return 0

        def __getattr__(self, name):
            return lambda *_: 0

    monkeypatch.setattr(cublaslt, "load", lambda: (Functions(), ctypes.c_void_p()))
    with _OnCpu():
        plain, product = cublaslt.Gemm(8, 16, torch.bfloat16, False), cublaslt.FactoredGemm(8, 16, torch.bfloat16)
    assert said[2] == 1 and said[3] == 1 and 7 not in said
    product(Algorithm(None, None, cublaslt._Opaque(), KIND), 16, 32, 48, 64, 0)
    _, _, alpha, a, _, b, _, beta, c, _, d, *_ = called[0]
    assert [held.value for held in (alpha, a, b, c, d)] == [48, 32, 16, 64, 64]
    assert beta.value == product._beta.data_ptr() and product._beta.item() == 0
    plain(Algorithm(None, None, cublaslt._Opaque(), KIND), 16, 32, None, 64, 0)
    assert called[1][2]._obj.value == 1 and called[1][7]._obj.value == 0


def test_the_certificates_of_both_ways_come_before_those_of_packed_weights():
    """A packed weight's certificate compares and times the way that dequantizes, so this way must have its own."""
    order = certify._PRODUCTS.index
    assert max(order(linear), order(factored_linear)) < order(packed_linear) < len(certify._PRODUCTS)


# Packed floats.

FEW, MANY = 0, 19  # forms: of up to 8 rows, and of 9 to 32
PACKED = packed_linear.Problem(N, K, torch.bfloat16, False, 4, 16, False, True)


@pytest.fixture
def forms(monkeypatch):
    """Stand-ins of the bundled kernels and of the clock. Returns what served, the microseconds of a way by number, and
    the factor by which a form's results are wrong."""
    served, us, wrong, weights = [], {}, {}, {}
    make = packing.pack_floats

    def kept(q, scale, whole):
        packed = make(q, scale, whole)
        value = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[q.long() & 7] * torch.where(q > 7, -1, 1)
        exact = value * scale.float().repeat_interleave(16, 1) * 2.0**-7
        weights[packed.data.data_ptr()] = exact.bfloat16()
        assert torch.equal(exact.bfloat16().float(), exact)
        return packed

    def product(number, x, packed, bias):
        served.append(number)
        added = 0 if bias is None else bias.float()
        found = sums(x, weights[packed.data.data_ptr()]) * packed.whole + added
        return (found * wrong.get(number, 1)).to(x.dtype)

    monkeypatch.setattr(packing, "pack_floats", kept)
    monkeypatch.setattr(linear, "bundled", lambda x, weight, bias, agree, out=None: biased(x, weight, bias, out))
    monkeypatch.setattr(packed_linear, "runnable", lambda problem: [FEW, MANY])
    monkeypatch.setattr(packed_linear, "_product", product)
    monkeypatch.setattr(packed_linear, "dequantize", lambda packed: weights[packed.data.data_ptr()].clone())
    monkeypatch.setattr(
        packed_linear.timing, "microseconds", lambda ways, replays: [us.get(w[0].args[0], 50.0) for w in ways]
    )
    return served, us, wrong


def biased(x, weight, bias, out):
    total = sums(x, weight) + (0 if bias is None else bias.float())
    return total.to(x.dtype) if out is None else out.copy_(total)


def drawn():
    generator = torch.Generator()
    q = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8)
    scale = (torch.rand((N, K // 16), generator=generator) * 32).to(torch.float8_e4m3fn)
    return packing.pack_floats(q, scale, torch.tensor(0.0123))


def results(rows=ROWS):
    """The operator's results of the same first rows, by the number of rows."""
    packed, x = drawn(), torch.randn(rows, K, generator=torch.Generator()).bfloat16()
    given = packed.data, packed.scale, None, None, 4, 16, packed.whole
    return {m: packed_linear.packed_linear(x[:m], *given) for m in (1, 8, 16, 17, 20, rows)}


def test_dequantized_floats_serve_many_rows_where_they_are_faster_with_the_same_bits(forms, tmp_path):
    served, us, _ = forms
    us[packed_linear._WHOLE] = 40.0
    certified(tmp_path)
    (made,) = packed_linear.certify([PACKED], ROWS, tmp_path)
    assert made.passed and made.algorithms == [[FEW], [MANY]] and made.key.data == packed_linear.DATA_OF_FLOATS
    assert made.preferred == {1: [FEW, FEW], 8: [FEW, FEW], 16: [MANY, MANY], ROWS: [packed_linear._WHOLE, MANY]}
    assert made.microseconds["served"][str(ROWS)] == 40
    served.clear()
    found = results()
    assert served == [FEW, FEW, MANY]  # 17 rows and more are dequantized
    assert all(torch.equal(got, found[ROWS][:m]) for m, got in found.items())


@pytest.mark.parametrize("slow", [True, False])
def test_without_the_other_route_or_where_it_is_slow_the_variants_serve_all_rows(slow, forms, emulated, tmp_path):
    served, us, _ = forms
    us[packed_linear._WHOLE] = 60.0 if slow else 40.0
    if not slow:
        emulated(rounded_first)
    certified(tmp_path)
    (made,) = packed_linear.certify([PACKED], ROWS, tmp_path)
    assert made.passed and made.preferred[ROWS] == [MANY, MANY]
    served.clear()
    results()
    assert served == [FEW, FEW, MANY, MANY, MANY, MANY]


def test_where_the_other_routes_certificate_is_gone_the_fastest_variant_serves(forms, tmp_path):
    served, us, _ = forms
    us[packed_linear._WHOLE] = 40.0
    certified(tmp_path)
    packed_linear.certify([PACKED], ROWS, tmp_path)
    factored_linear._routes.clear()
    served.clear()
    results()
    assert served == [FEW, FEW, MANY, MANY, MANY, MANY]


def test_dequantized_floats_do_not_serve_without_the_certificate_of_packed_ones(forms, tmp_path):
    """This certificate is the one that compares what dequantizes."""
    certified(tmp_path)
    packed, x = drawn(), torch.randn(ROWS, K).bfloat16()
    with pytest.raises(CertificateFailed, match="e2m1 .*has no certificate"):
        packed_linear.packed_linear(x, packed.data, packed.scale, None, None, 4, 16, packed.whole)


def test_dequantized_floats_with_other_bits_do_not_serve(forms, emulated, tmp_path):
    served, us, _ = forms
    us[packed_linear._WHOLE] = 40.0
    certified(tmp_path)
    emulated(lambda x, weight, whole, out: right(x, weight, whole, out) * 2)
    (made,) = packed_linear.certify([PACKED], ROWS, tmp_path)
    assert not made.passed and "outputs of the library differ" in made.evidence.first
    assert made.preferred[ROWS] == [MANY, MANY]
    served.clear()
    results()
    assert served == [FEW, FEW, MANY, MANY, MANY, MANY]


def test_no_engine_starts_without_a_variant(forms, tmp_path, monkeypatch):
    _, _, wrong = forms
    wrong.update({FEW: 2, MANY: 2})
    certified(tmp_path)
    with pytest.raises(CertificateFailed, match="cuda.packed_linear .*e2m1"):
        packed_linear.certify([PACKED], ROWS, tmp_path / "a")
    monkeypatch.setattr(packed_linear, "runnable", lambda problem: [])
    with pytest.raises(CertificateFailed, match="cuda.packed_linear .*e2m1"):
        packed_linear.certify([PACKED], ROWS, tmp_path / "b")


def test_a_bias_and_integers_keep_their_certificates(forms, tmp_path):
    certified(tmp_path)
    with_bias = PACKED._replace(bias=True)
    (made,) = packed_linear.certify([with_bias], ROWS, tmp_path)
    assert made.passed and made.preferred[ROWS] == [MANY] and made.key.data == packed_linear.DATA
    assert with_bias.dequantized() is None
    integers = packed_linear.Problem(N, K, torch.bfloat16, False, 4, 128, False)
    assert packed_linear._key(integers, ROWS).data == packed_linear.DATA
    assert integers.dequantized() == linear.Problem(N, K, torch.bfloat16, False)
