"""On a GPU: sums over emulated ranks in rank order, and products whose bits do not depend on the number of ranks."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [1, 7, 1001, 4096, 262145])
def test_the_bundled_sum_is_in_rank_order(n, dtype):
    from bi_patch.kernels.triton.ranks import rank_sum
    from bi_patch.ops import bits, collectives

    for ranks in range(1, 9):
        parts = torch.randn(ranks, n, device="cuda").to(dtype)
        assert not bits.differing(rank_sum(parts), collectives.in_rank_order(parts)), ranks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "k", "leaves"),
    [(4096, 12288, 8), (2048, 2048, 8), (640, 384, 4), (512, 256, 2), (512, 512, 8), (512, 256, 8)],
)
def test_products_have_the_same_bits_for_every_number_of_ranks(n, k, leaves, dtype):
    from bi_patch.kernels.triton import leaves as kernels

    w = (torch.randn(n, k, device="cuda") * k**-0.5).to(dtype)
    bias = torch.randn(n, device="cuda").to(dtype)
    x = torch.randn(600, k, device="cuda").to(dtype)
    whole = kernels.product(x, w, bias, leaves, dtype)
    root = kernels.product(x, w, None, leaves, torch.float32)
    want = x.double() @ w.double().T + bias.double()
    assert (whole.double() - want).norm() / want.norm() < 4e-3
    for at, m in ((0, 1), (3, 2), (8, 17), (0, 64), (1, 128), (100, 129), (0, 513), (0, 600)):
        rows = x[at : at + m]
        for ranks in (r for r in (1, 2, 4, 8) if r <= leaves):
            parts = [slice(r * k // ranks, (r + 1) * k // ranks) for r in range(ranks)]
            roots = [kernels.product(rows[:, c], w[:, c], None, leaves // ranks, torch.float32) for c in parts]
            got = kernels.tree(torch.stack(roots), bias, dtype)
            assert torch.equal(got, whole[at : at + m]), (ranks, at, m)
            assert torch.equal(kernels.tree(torch.stack(roots), None, torch.float32), root[at : at + m]), (ranks, at, m)


@pytest.mark.parametrize("sizes", [[5, 1, 0, 64], [16, 16, 16, 16]])
def test_whichever_rank_keeps_a_row_its_sum_has_the_same_bits(sizes):
    from bi_patch.ops import bits, collectives
    from bi_patch.ops.cuda import ranks as ops

    every = torch.randn(4, sum(sizes), 2048, device="cuda").bfloat16()
    whole = collectives.in_rank_order(every)
    for rank, want in enumerate(whole.split(sizes)):

        def exchange(out, x, rank=rank):
            out.copy_(torch.stack([part.split(sizes)[rank].reshape(-1) for part in every]))

        got = ops.reduce_scatter(every[rank], sizes, rank, ops.Carrier(4, None, exchange))
        assert got.shape == want.shape and not bits.differing(got, want)
