"""What the demo's tests share: the small answers that they compare."""

import pytest

from bi_patch.bench.answers import Answer


@pytest.fixture
def answer():
    return Answer(
        tokens=[5, 6, 7],
        logprobs=[-0.5, -1.5, -2.5],
        top=[[(5, -0.5), (9, -0.75)], [(6, -1.5)], [(7, -2.5)]],
        prompt_logprobs=[-3.0, -4.0],
        prompt_top=[[(1, -3.0)], [(2, -4.0)]],
        text=" the cat sat",
    )
