"""On a GPU, in an engine: decodes that leave a page of states, and prompts that go on from such a page."""

import importlib.metadata
import os
import random

import pytest
import torch
from packaging.version import Version

from bi_patch.platforms.features.recurrent import RECURRENT
from bi_patch.tools.faults import engines
from bi_patch.tools.models import families, shapes
from bi_patch.tools.verify.answers import Request, compare
from bi_patch.tools.verify.child import ARMED, PATIENT, ChildEngine

LAYERS = ("gated delta nets (Qwen3-Next)", "Mamba 2 (Falcon-H1, Granite 4-H, Nemotron-H)")  # rows of the feature table


def _refused() -> bool:
    """Whether the feature table refuses gated delta nets or Mamba 2 in this release of vLLM."""
    rows = [row for row in RECURRENT if row.name in LAYERS]
    assert len(rows) == len(LAYERS)  # here, so that a run without a GPU notices, too
    if not torch.cuda.is_available():
        return False  # vLLM's CPU build has another name
    release = Version(importlib.metadata.version("vllm"))
    return any(row.cell("cuda", release).state == "refused" for row in rows)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(_refused(), reason="this release's recurrent layers are refused by name"),
]

GENERATED, CUT = 24, 16


@pytest.mark.parametrize(("family", "changed"), [("Qwen3-Next", {}), ("Granite 4-H", {"mamba_d_state": 64})])
def test_states_of_pages_that_decodes_leave(tmp_path, family, changed):
    folder = shapes.save(family, families.FAMILIES[family] | changed, str(tmp_path / "changed"))
    options = engines.of_family(family, str(tmp_path), platform="cuda").but(digests=False, model=folder)
    with ChildEngine(ARMED, options, environ=PATIENT | dict(os.environ)) as engine:
        page, source = engine.info.block_size, random.Random(3)
        prompts = [tuple(source.randrange(2000) for _ in range(page - 2 - i)) for i in range(9)]
        requests = [Request(prompt, max_tokens=GENERATED, logprobs=3) for prompt in prompts]
        alone = []
        for request in requests:
            engine.reset_cache()
            alone += engine.generate([request])
        engine.reset_cache()
        together = engine.generate(requests)
        for mine, other in zip(alone, together, strict=True):
            assert not compare(mine, other).differing
        # Their pages are in the prefix cache now. The rest of each answer is generated anew.
        longer = [
            Request(prompt + tuple(answer.tokens[:CUT]), max_tokens=GENERATED - CUT, logprobs=3)
            for prompt, answer in zip(prompts, alone, strict=True)
        ]
        for answer, rest in zip(alone, engine.generate(longer), strict=True):
            assert rest.tokens == answer.tokens[CUT:] and rest.logprobs == answer.logprobs[CUT:]
            assert rest.top == answer.top[CUT:]
