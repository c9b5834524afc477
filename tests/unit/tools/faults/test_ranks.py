"""The planted sums over ranks: right sums, and other bits than the sum in rank order."""

import sys
from types import SimpleNamespace

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


def _slices():
    return torch.randn(4, 64 * 256, generator=torch.Generator().manual_seed(3)).bfloat16()


@pytest.mark.parametrize("name", ranks.SLICES)
def test_a_slice_depends_on_more_than_its_parts(name):
    parts, way = _slices(), ranks.SLICES[name]
    got = [way(parts, rank) for rank in (0, 1)]
    assert not torch.equal(*got)
    assert all(torch.allclose(one.float(), parts.float().sum(0), atol=0.1) for one in got)


def test_two_ranks_show_what_looks_at_the_size():
    """Two parts have one sum in any order, so the others are planted over more ranks."""
    assert ranks.shown_by(2) == tuple(ranks.OF_TWO) and set(ranks.shown_by(4)) == {*ranks.SLICES, *ranks.OF_TWO}
    parts = _slices()[:2]
    assert all(torch.equal(way(parts, 0), way(parts, 1)) for name, way in ranks.SLICES.items() if "arrival" not in name)
    for way in ranks.OF_TWO.values():
        few, many = way(parts[:, :8], 0), way(parts, 0)
        assert torch.equal(few, parts[0, :8] + parts[1, :8]) and not torch.equal(few, many[:8])


def test_small_slices_have_another_order_than_large_ones():
    parts = _slices()
    few, many = ranks.small_from_the_owner(parts[:, :256], 1), ranks.small_from_the_owner(parts, 1)
    assert not torch.equal(few, many[:256])


@pytest.mark.parametrize(("platform", "attribute"), [("cpu", "in_rank_order"), ("cuda", "rank_sum")])
def test_a_fault_replaces_what_adds_the_parts(platform, attribute, monkeypatch):
    from bi_patch.ops.cpu import leaves
    from bi_patch.seams import active

    kernels = SimpleNamespace(rank_sum=collectives.in_rank_order)
    monkeypatch.setattr("bi_patch.kernels.triton.ranks", kernels, raising=False)
    monkeypatch.setitem(sys.modules, "bi_patch.kernels.triton.ranks", kernels)
    monkeypatch.setattr("vllm.distributed.parallel_state.get_dp_group", lambda: SimpleNamespace(rank_in_group=1))
    monkeypatch.setattr(active, "plan", SimpleNamespace(platform=platform))
    monkeypatch.setattr(ranks, "_own", {})
    monkeypatch.setattr(leaves, "tree", leaves.tree)  # so that all is as it was after this test
    monkeypatch.setattr(collectives, "in_rank_order", collectives.in_rank_order)
    where = kernels if platform == "cuda" else collectives
    own = getattr(where, attribute)
    for name in ranks.shown_by(4) if platform == "cuda" else ranks.WAYS:
        assert ranks.put(None, name) and getattr(where, attribute) is not own
        if platform == "cuda":
            assert not torch.equal(getattr(where, attribute)(_slices()), own(_slices()))
    assert ranks.put(None, "") and getattr(where, attribute) is own


def test_small_messages_have_another_order_than_large_ones():
    parts = torch.randn(4, 40, 256, generator=torch.Generator().manual_seed(5))
    for way in (ranks.two_shot, ranks.by_size):
        assert not torch.equal(way(parts[:, -1:]), way(parts)[-1:])


def test_parts_added_one_by_one_depend_on_the_number_of_ranks():
    """Of one rank they are eight parts, of two ranks four each and then two roots; the tree is the same for both."""
    parts = list(torch.randn(8, 64, 256, generator=torch.Generator().manual_seed(3)))
    for add, equal in ((ranks.TREES["parts of K added one by one"], False), (leaves.tree, True)):
        assert torch.equal(add(parts), add([add(parts[:4]), add(parts[4:])])) == equal
