"""Top-k in which the lower index wins a tie, on all rows at once and in pieces of rows."""

import pytest
import torch

from bi_patch.ops import topk as module
from bi_patch.ops.topk import topk


@pytest.mark.parametrize("piece", [1 << 23, 1100, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_go_to_the_lower_index(dtype, piece, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", piece)
    values = torch.randint(-3, 3, (7, 500)).to(dtype)
    values[0, 5], values[0, 2] = 0.0, -0.0
    values[1, 9] = float("inf")
    values[2] = float("-inf")
    found = topk(values, 40)
    expected = torch.sort(values, dim=-1, descending=True, stable=True)
    assert torch.equal(found.indices, expected.indices[:, :40])
    assert torch.equal(found.values, expected.values[:, :40])


def test_topk_takes_the_last_dimension_only():
    with pytest.raises(ValueError, match="last dimension"):
        topk(torch.zeros(3, 4), 2, 0)
