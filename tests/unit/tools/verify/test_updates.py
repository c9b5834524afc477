"""The memory that verify counts after an update."""

import gc

import torch

from bi_patch.tools.verify import updates


def test_held_counts_frozen_tensors():
    """vLLM freezes its objects after the start, so the garbage collector does not list the model's parameters."""
    made = torch.ones(1000, 1000)
    gc.freeze()
    try:
        assert updates.held()[1] >= made.untyped_storage().nbytes()
    finally:
        gc.unfreeze()
