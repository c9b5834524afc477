"""Where sequences lie in a batch: padded, packed, full; and the batches that a sampler never sees."""

import pytest
import torch

from bi_patch.errors import UnsupportedRequest
from bi_patch.training import layout


def where(found):
    return [x.tolist() for x in found]


def test_padding_on_any_side():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]])
    assert where(layout.padded(mask)) == [[0, 6, 9, 12], [3, 2, 2, 0]]
    assert where(layout.padded(mask.bool())) == where(layout.padded(mask))


@pytest.mark.parametrize("mask", [[[1, 0, 1]], [[1, 1, 2]], [[1.0, 0.5, 0.0]]])
def test_a_mask_that_is_no_padding_mask(mask):
    with pytest.raises(UnsupportedRequest, match="training.mask"):
        layout.padded(torch.tensor(mask))


def test_packed_rows():
    assert where(layout.packed(torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]))) == [
        [0, 3, 4, 6, 8],
        [3, 1, 2, 2, 4],
    ]
    assert where(layout.cumulative(torch.tensor([0, 3, 3, 7], dtype=torch.int32))) == [[0, 3, 3], [3, 0, 4]]
    with pytest.raises(UnsupportedRequest, match="training.positions"):
        layout.packed(torch.tensor([[1, 2, 3]]))


def test_positions_begin_at_the_first_token():
    starts, lengths = layout.padded(torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]))
    assert layout.positions(starts, lengths, 8).tolist() == [0, 1, 2, 0, 0, 0, 0, 1]
    assert layout.rows_of(starts, lengths).tolist() == [0, 1, 2, 6, 7]
    layout.positions(starts, lengths, 8, torch.tensor([0, 1, 2, 9, 9, 9, 0, 1]))
    with pytest.raises(UnsupportedRequest, match="training.positions"):
        layout.positions(starts, lengths, 8, torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    with pytest.raises(UnsupportedRequest, match="training.layout"):
        layout.positions(starts, lengths, 7)
