"""The CUDA orders' parts that need no GPU: spans of M, tiles, ties, and replaced globals."""

import random

import pytest
import torch

from bi_patch.orders import cuda_linear, cuda_moe
from bi_patch.seams.overlay import Overlay, with_globals


def test_routes_hold_exactly_the_rows_that_passed():
    rng = random.Random(5)
    for _ in range(50):
        passed = sorted(rng.sample(range(1, 60), rng.randrange(0, 40)))
        route = cuda_linear.Route(cuda_linear._bounds(passed), False, None)
        assert [m for m in range(1, 70) if route.vendor(m)] == passed


@pytest.mark.parametrize("k", [64, 65, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_compared_sums_are_zero_and_leave_their_order(dtype, k):
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(k, generator=generator)
    x = cuda_linear.cancelling(5, order, 1, generator, dtype)
    w = cuda_linear.cancelling(40, order, -1, generator, dtype)
    assert x.shape == (5, k) and x.is_contiguous() and x.dtype == dtype
    assert float((x.double() @ w.double().T).abs().max()) < 1e-9
    terms = x[:, None].float() * w[None].float()
    one, other = (sum(part.cumsum(-1)[..., -1] for part in terms.split(size, -1)) for size in (k, 32))
    if k == 4096:
        assert float((one.to(dtype) != other.to(dtype)).float().mean()) > 0.5


def test_unequal_counts_bits_not_values():
    a = torch.tensor([0.0, 1.0, 2.0], dtype=torch.bfloat16)
    b = torch.tensor([-0.0, 1.0, 3.0], dtype=torch.bfloat16)
    assert cuda_linear._unequal(a, b) == 2
    assert cuda_linear._unequal(a, a.clone()) == 0


@pytest.mark.parametrize("shared", [49152, 101376, 166912, 232448])
@pytest.mark.parametrize("size", [2, 4])
def test_tiles_fit_the_shared_memory(shared, size):
    gemm = pytest.importorskip("bi_patch.kernels.triton.gemm", reason="triton is not installed")
    for rows in (1, 16, 17, 64, 128, 300, 5000):
        for cols in (128, 2048, 4096, 24576):
            tile = gemm.choose(rows, cols, 4096, size, shared, False)
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
