"""Which of cuBLASLt's algorithms become offers, and which offer serves. The library is a fake; no GPU is needed."""

import ctypes
import gc
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import CertificateFailed
from bi_patch.ops.cuda import cublaslt, outer
from bi_patch.ops.cuda.cublaslt import Algorithm, Kind
from bi_patch.ops.cuda.cublaslt_choice import choose, compare, prefer, timed_rows

A, B, C, D = (Kind(i, 0, 1, 0, 0, 0, 0, 0) for i in range(1, 5))


class Fake:
    """A fake of cuBLASLt's functions. An algorithm's first words are its id, split-K, reduction scheme and cluster."""

    def __init__(self, answers, code=0):
        self.answers, self.code, self.asked = answers, code, 0

    def cublasLtMatmulAlgoGetHeuristic(self, *args):
        *_, wanted, results, count = args
        self.asked += 1
        for result, (algorithm, state, workspace) in zip(results, self.answers[:wanted]):
            result.algorithm.data[: len(algorithm)] = algorithm
            result.state, result.workspace = state, workspace
        count._obj.value = min(wanted, len(self.answers))
        return self.code

    def cublasLtMatmulAlgoConfigGetAttribute(self, algo, attribute, value, size, written):
        word = {0: 0, 2: 1, 3: 2, 8: 3}.get(attribute)
        value._obj.value = algo._obj.data[word] if word is not None else 0
        return 0

    def __getattr__(self, name):
        if not name.startswith("cublasLt"):
            raise AttributeError(name)
        return lambda *_: 0


def gemm(monkeypatch, *answers, code=0):
    fake = Fake(answers, code)
    monkeypatch.setattr(cublaslt, "load", lambda: (fake, ctypes.c_void_p()))
    return cublaslt.Gemm(8, 16, torch.bfloat16, False)


def test_offers_keep_the_librarys_order_and_leave_out_what_splits_or_repeats(monkeypatch):
    library = gemm(
        monkeypatch,
        ((1, 1, 0, 0), 0, 0),
        ((2, 4, 0, 0), 0, 0),  # splits K
        ((3, 1, 2, 0), 0, 0),  # reduces
        ((4, 1, 0, 0), 7, 0),  # not supported
        ((5, 1, 0, 0), 0, 64),  # needs a workspace
        ((6, 0, 0, 2), 0, 0),
        ((1, 1, 0, 0, 9), 0, 0),  # the first again: it differs only in an attribute that is no part of a kind
        ((7, 1, 0, 0), 0, 0),
        ((8, 1, 0, 0), 0, 0),  # the ninth
    )
    offers = library.offers(5)
    assert [offer.kind.id for offer in offers] == [1, 6, 7]
    assert offers[1].kind.cluster == 2 and offers[0].opaque.data[4] == 0
    assert len({(id(offer.x), id(offer.out)) for offer in offers}) == 1


def test_an_offers_algorithm_outlives_the_answers_that_it_came_in(monkeypatch):
    library = gemm(monkeypatch, ((1, 1), 0, 0), ((2, 1), 0, 0))
    kept = library.offers(5)
    library._library.answers = (((3, 1), 0, 0), ((4, 1), 0, 0))
    assert [offer.kind.id for offer in library.offers(5)] == [3, 4]
    assert [offer.opaque.data[0] for offer in kept] == [1, 2]
    assert all(offer.opaque._b_base_ is None for offer in kept)  # copies, not parts of the array


@pytest.mark.parametrize("code,answers", [(15, [((1, 1), 0, 0)]), (0, [])])
def test_no_answer_is_no_offer(monkeypatch, code, answers):
    assert gemm(monkeypatch, *answers, code=code).offers(5) == []


def made(*kinds):
    return [Algorithm(None, None, None, kind) for kind in kinds]


def anything(kind):
    return True


def test_offers_are_timed_up_to_the_limit_and_there():
    assert timed_rows(1) == [1]
    assert timed_rows(100) == [1, 8, 16, 32, 64, 100]
    assert timed_rows(192) == [1, 8, 16, 32, 64, 128, 192]
    assert timed_rows(20000)[-2:] == [8192, 20000]


@pytest.mark.parametrize(
    "times,kind",
    [
        ([10, 11, 12], A),
        ([10, 9.9, 9.81], A),
        ([10, 10, 10], A),
        ([10, 9.8, 12], B),
        ([10, 9, 8], C),
    ],
)
def test_the_first_offer_is_kept_unless_another_is_clearly_faster(times, kind):
    assert prefer({1: made(A, B, C)}, {1: times}) == {1: kind}


def test_what_is_preferred_ends_with_the_last_timed_rows():
    offers = {m: made(A, B) for m in (1, 8, 16, 32, 64)} | {8: made(B), 16: []}
    times = {1: [5, 1], 32: [5, 6]}
    assert prefer(offers, times) == {1: B, 8: B, 32: A}  # 8: the only one; 16: none; 64: not timed
    assert prefer(offers, {}) == {}


@pytest.mark.parametrize(
    "rows,offered,may,served",
    [
        (192, (A, B), (A, B), B),
        (129, (A, B), (A, B), B),  # between two timed M: as at the larger
        (128, (A, B), (A, B), A),
        (1, (A, B), (A, B), A),
        (130, (A, C), (A, B, C), A),  # not offered: the first
        (130, (A, B), (A, C), A),  # not certified: the first
        (130, (A, B, C), (C,), C),  # the first is not certified either
        (130, (A, B), (C,), None),
        (193, (B, A), (A, B), B),  # beyond the last timed M: the first
        (193, (C, A), (A, B), A),
        (192, (), (A, B), None),
    ],
)
def test_which_offer_serves(rows, offered, may, served):
    offer = choose(rows, made(*offered), {128: A, 192: B}, lambda kind: kind in may)
    assert (offer and offer.kind) == served


def serving(offers, preferred, wrong, rows=None):
    """The result of `compare` if all outputs of the kinds in `wrong` differ, and the kind that then serves each M."""
    found = compare(offers, preferred, lambda m, offer: 3 if offer.kind in wrong else 0)
    good = {kind for kind, differing in found.items() if not any(differing.values())}
    served = {m: choose(m, offered, preferred, lambda kind: kind in good) for m, offered in offers.items()}
    return found, {m: offer and offer.kind for m, offer in served.items()}


def test_every_first_and_every_preferred_kind_is_compared_at_the_ends_of_its_rows():
    offers = {m: made(A, B, C) for m in range(1, 11)}
    found, served = serving(offers, {8: B}, ())
    assert found == {B: {1: 0, 5: 0, 8: 0}, A: {1: 0, 6: 0, 10: 0}}
    assert served == {m: B if m <= 8 else A for m in offers}


def test_where_the_preferred_kind_differs_the_first_serves():
    offers = {m: made(A, B, C) for m in range(1, 11)}
    found, served = serving(offers, {8: B}, {B})
    assert any(found[B].values()) and set(served.values()) == {A}


def test_what_takes_the_place_of_kinds_that_differ_is_compared_where_it_serves():
    offers = {m: made(A, B, C) if m <= 8 else made(C, A) for m in range(1, 11)}
    found, served = serving(offers, {8: B}, {A, B})
    assert set(served.values()) == {C}
    assert {1, 10} <= found[C].keys()  # C is the first offer from 9 on, but serves from 1 on
    _, none = serving(offers, {8: B}, {A, B, C})
    assert set(none.values()) == {None}


def test_an_m_without_offers_has_none_to_compare():
    assert compare({1: [], 2: made(D)}, {}, lambda m, offer: 0) == {D: {2: 0}}
    assert compare({}, {}, lambda m, offer: 0) == {}


@pytest.mark.parametrize("group", [0, 128])
def test_a_scaled_product_says_what_shares_a_scale(group, monkeypatch):
    fake, said, types = Fake([((3, 1), 0, 0)]), {}, []

    def describe(desc, attribute, value, size):
        said[attribute] = value._obj.value
        return 0

    def layout(made, kind, *_):
        types.append(kind)
        return 0

    fake.cublasLtMatmulDescSetAttribute, fake.cublasLtMatrixLayoutCreate = describe, layout
    monkeypatch.setattr(cublaslt, "load", lambda: (fake, ctypes.c_void_p()))
    product = cublaslt.ScaledGemm(256, 128, torch.bfloat16, True, group)
    assert (said[31], said[32]) == ((5, 4) if group else (3, 3))  # of the weight, of the rows
    assert said[17] and said[18] and said[25] == (0 if group else 1) and (said[7], said[26]) == (4, 14)
    (offer,) = product.offers(4)
    assert types == [28, 28, 14] and offer.kind.id == 3  # weight and rows are e4m3, the result is bf16
    product(offer, 16, 32, 48, 64, 80, 96, 0)
    assert (said[17], said[18], said[8]) == (64, 48, 80)


def test_a_weight_gradient_takes_the_first_offer_that_does_not_split(monkeypatch):
    fake = Fake([((2, 4, 0, 0), 0, 0), ((5, 1, 0, 0), 0, 64), ((6, 1, 0, 0), 0, 0), ((1, 1, 0, 0), 0, 0)])
    monkeypatch.setattr(cublaslt, "load", lambda: (fake, ctypes.c_void_p()))
    product = cublaslt.WeightGradient(7, 8, 16, torch.bfloat16, torch.float32)
    assert product._algorithm.data[0] == 6
    product(16, 32, 48, 1.0, 0)
    fake.answers = []
    with pytest.raises(CertificateFailed, match="M=7 N=8 K=16"):
        cublaslt.WeightGradient(7, 8, 16, torch.bfloat16, torch.float32)


def test_calls_of_two_threads_add_their_own_bias(monkeypatch):
    """The library's functions run without Python's lock, so another thread may run between two of them."""
    fake, added = Fake([]), []

    def matmul(*arguments):
        time.sleep(0.001)
        added.append((arguments[8].value, fake.bias))

    def describe(desc, attribute, value, size):
        if attribute == cublaslt._DESC_BIAS:
            fake.bias = value._obj.value
            time.sleep(0.001)
        return 0

    fake.cublasLtMatmul, fake.cublasLtMatmulDescSetAttribute = matmul, describe
    monkeypatch.setattr(cublaslt, "load", lambda: (fake, ctypes.c_void_p()))
    shared = cublaslt.Gemm(8, 16, torch.bfloat16, True)
    algorithm = Algorithm(None, None, cublaslt._Opaque(), A)

    def run(name):
        for _ in range(20):
            shared(algorithm, 16, 32, name, name, 0)

    threads = [threading.Thread(target=run, args=(name,)) for name in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(added) == 40 and all(out == bias for out, bias in added)


def test_the_products_of_many_lengths_are_freed(monkeypatch):
    fake = Fake([((1, 1, 0, 0), 0, 0)])
    made, freed = [], []
    for name, calls in (("Create", made), ("Destroy", freed)):
        for kind in ("MatmulDesc", "MatrixLayout", "MatmulPreference"):
            monkeypatch.setattr(
                fake, f"cublasLt{kind}{name}", lambda *_, k=kind, c=calls: c.append(k) or 0, raising=False
            )
    monkeypatch.setattr(cublaslt, "load", lambda: (fake, ctypes.c_void_p()))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    limit = outer._product.cache_info().maxsize
    out = torch.zeros(8, 8)
    for rows in range(1, limit + 11):
        x = torch.zeros(rows, 8)
        outer.product(x, x, out)
    assert outer._product.cache_info().currsize == limit
    gc.collect()
    assert (len(made), len(freed)) == (5 * (limit + 10), 50)
    outer._product.cache_clear()
    gc.collect()
    assert sorted(made) == sorted(freed)
