"""The planted sums over ranks: right sums, and other bits than the sum in rank order."""

import pytest
import torch

from bi_patch.ops import collectives
from bi_patch.ops.cpu import leaves
from bi_patch.tools.faults import ranks


@pytest.mark.parametrize("name", ranks.WAYS)
def test_another_order_of_the_same_sum(name):
    generator = torch.Generator().manual_seed(3)
    large = torch.randn(4, 64, 256, generator=generator)
    want = collectives.in_rank_order(large)
    torch.manual_seed(3)  # of the order in which parts arrive
    got = ranks.WAYS[name](large)
    assert got.shape == want.shape and torch.allclose(got, want, atol=1e-5) and not torch.equal(got, want)


def test_small_messages_have_another_order_than_large_ones():
    parts = torch.randn(4, 40, 256, generator=torch.Generator().manual_seed(5))
    for way in (ranks.two_shot, ranks.by_size):
        assert not torch.equal(way(parts[:, -1:]), way(parts)[-1:])


def test_parts_added_one_by_one_depend_on_the_number_of_ranks():
    """Of one rank they are eight parts, of two ranks four each and then two roots; the tree is the same for both."""
    parts = list(torch.randn(8, 64, 256, generator=torch.Generator().manual_seed(3)))
    for add, equal in ((ranks.TREES["parts of K added one by one"], False), (leaves.tree, True)):
        assert torch.equal(add(parts), add([add(parts[:4]), add(parts[4:])])) == equal
