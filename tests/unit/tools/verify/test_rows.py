"""Digests of whole rows of logits that model runner V2 passes on; a test on the real engine covers V1."""

import types

import numpy as np
import torch
from vllm.v1.worker.gpu.sample import logits_processor as V2

from bi_patch.tools.verify import rows


def parameters(name=None):
    return types.SimpleNamespace(extra_args={rows.KEY: name} if name else None)


def context(slots, lengths):
    return types.SimpleNamespace(idx_mapping_np=np.array(slots), seq_lens_upper_bound_np=np.array(lengths))


def test_rows_are_kept_by_slot_and_generated_position():
    assert issubclass(rows.Digests, V2.LogitsProcessor)
    held = types.SimpleNamespace(prompt_len=types.SimpleNamespace(np=np.array([3, 10, 5])))
    digests = rows.Digests(None, held)
    assert digests.add_request(0, parameters("first")) and digests.add_request(1, parameters("long"))
    assert not digests.add_request(2, parameters())
    logits = list(torch.randn(4, 3, 8))
    for step, (slots, lengths) in enumerate([([2, 0, 1], [5, 3, 4]), ([0, 1, 2], [4, 10, 6]), ([1, 2, 0], [11, 7, 5])]):
        assert digests.apply(logits[step], context(slots, lengths)) is logits[step]
    digests.add_request(0, parameters())  # a request without digest takes over the slot
    digests.apply(logits[3], context([0, 1, 2], [3, 12, 8]))

    def wanted(*places):
        for position, (step, row) in enumerate(places):
            rows.keep("wanted", position, logits[step][row].clone())
        return rows.take("wanted")

    assert rows.take("first") == wanted((0, 1), (1, 0), (2, 2))
    assert rows.take("long") == wanted((1, 1), (2, 0), (3, 1))  # not the chunk before its prompt's end
    assert not rows.kept
