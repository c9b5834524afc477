"""A fault of image encoders: the images of a step are encoded together, and share a sum."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

import torch

from bi_patch.tools.faults import parts
from bi_patch.tools.faults.base import CPU, Fault
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.runner import ENCODED, model_runner, replaced

AXIS = "images"


@contextlib.contextmanager
def one_batch(engine: LocalEngine) -> Iterator[None]:
    """vLLM's own call encodes all images of a step, padded to one size. Their rows share a sum over the batch."""
    runner = model_runner(engine)
    own = types.MethodType(parts.original("vision.cpu_alone"), runner)

    def make(held):
        def embed_multimodal(**items):
            rows = list(held(**items))
            if len(rows) < 2:
                return rows
            shared = torch.nn.utils.rnn.pad_sequence(rows).sum(1)  # padded to the longest
            return [(row + shared[: len(row)]) - shared[: len(row)] for row in rows]

        return embed_multimodal

    with (
        replaced(runner, "_execute_mm_encoder", lambda held: own),
        replaced(runner.get_model(), "embed_multimodal", make),
    ):
        yield


FAULTS = (
    Fault(
        "images in one batch",
        36,
        one_batch.__doc__,
        AXIS,
        one_batch,
        (CPU,),
        "image encoder",
        ENCODED,
        {"cpu": "vision.cpu_alone"},
        emulated=(CPU,),
    ),
)
