"""The CUDA orders' parts that need no GPU: routes, tiles, ties, and replaced globals."""

import pytest
import torch

from bi_patch.orders import cublaslt, cuda_linear, cuda_moe, zero_sums
from bi_patch.seams.overlay import Overlay, with_globals


class Library:
    """What the vendor would answer: an algorithm of one kind up to 40 rows, of another above, none for 13."""

    def __init__(self):
        self.asked = []

    def plan(self, rows):
        self.asked.append(rows)
        return None if rows == 13 else cublaslt.Plan(None, None, None, FEW if rows <= 40 else MANY)


FEW, MANY = (cublaslt.Kind(i, 0, 1, 0, 0, 0, 0, 0) for i in (1, 2))


@pytest.mark.parametrize("kinds,served", [
    ((FEW, MANY), range(1, 61)), ((FEW,), range(1, 41)), ((MANY,), range(41, 61)), ((), ()),
])  # fmt: skip
def test_only_algorithms_that_passed_serve_and_only_up_to_the_limit(kinds, served):
    library = Library()
    route = cuda_linear.Route(frozenset(kinds), 60, False, library)
    for _ in range(2):
        assert [m for m in range(1, 90) if route.plan(m) is not None] == [m for m in served if m != 13]
    assert sorted(library.asked) == list(range(1, 61))  # once each


def test_the_rows_that_are_asked_for():
    assert cuda_linear.asked_rows(5) == [1, 2, 3, 4, 5]
    asked = cuda_linear.asked_rows(16384)
    assert asked[:1024] == list(range(1, 1025)) and asked[-1] == 16384 and len(asked) < 3300
    assert {m % 64 for m in asked[1024:]} == set(range(64))  # whatever a choice is aligned to


def ordered(a, b, size):
    """a [M, K] @ b [N, K].T in fp32: products added one after the other in blocks of `size`, then the blocks."""
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
    problem = cuda_moe.Problem(4, 256, 1024, 2, dtype)
    x, w13, w2 = cuda_moe.operands(problem, 8, torch.Generator().manual_seed(3))
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


def test_unequal_counts_bits_not_values():
    a = torch.tensor([0.0, 1.0, 2.0], dtype=torch.bfloat16)
    b = torch.tensor([-0.0, 1.0, 3.0], dtype=torch.bfloat16)
    assert cuda_linear.unequal(a, b) == 2
    assert cuda_linear.unequal(a, a.clone()) == 0


@pytest.mark.parametrize("shared", [49152, 101376, 166912, 232448])
@pytest.mark.parametrize("size", [2, 4])
def test_tiles_fit_the_shared_memory(shared, size):
    gemm = pytest.importorskip("bi_patch.kernels.triton.gemm", reason="triton is not installed")
    for rows in (1, 16, 17, 64, 128, 300, 5000):
        for cols in (128, 2048, 4096, 24576):
            tile = gemm.choose(rows, cols, 4096, size, shared, 132, False)
            assert (tile.m + tile.n) * tile.k * size * tile.stages <= shared or tile.stages == 2
            assert not tile.persistent


def test_tiles_never_split_k():
    assert cuda_moe.one_pass({"BLOCK_SIZE_M": 16, "SPLIT_K": 4})["SPLIT_K"] == 1


def test_the_bundled_table_of_experts_never_splits_k():
    import json

    files = list(cuda_moe._TABLES.glob("moe-*.json"))
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
