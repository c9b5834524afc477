"""Top-k and top-p on CPU: a row's bits do not depend on its company, and a row that asks for nothing keeps its bits."""

import pytest
import torch

from bi_patch.ops.cpu import top_k_top_p

VOCAB = 1000
NONE = {"k": VOCAB, "p": 1.0}
ASKS = [NONE, {"k": 20, "p": 1.0}, {"k": VOCAB, "p": 0.9}, {"k": 50, "p": 0.7}, {"k": 1, "p": 1.0}, {"k": 3, "p": 0.01}]


def masked(logits, asks):
    """The masks as vLLM asks for them: None for a limit that no row has."""
    k = torch.tensor([a["k"] for a in asks], dtype=torch.int32) if any(a["k"] < VOCAB for a in asks) else None
    p = torch.tensor([a["p"] for a in asks]) if any(a["p"] < 1 for a in asks) else None
    return top_k_top_p.mask(logits.clone(), k, p)


def rows(count, spread=4.0, ties=False):
    made = torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(count)) * spread
    return made.round() if ties else made


def same(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("spread", [1.0, 60.0])  # at 60, the probability of most tokens underflows to 0
def test_a_row_beside_others_equals_the_row_alone(ties, spread):
    logits = rows(len(ASKS), spread, ties)
    together = masked(logits, ASKS)
    for i, ask in enumerate(ASKS):
        assert same(together[i], masked(logits[i : i + 1], [ask])[0]), ask
        for j, other in enumerate(ASKS):
            assert same(masked(logits[[i, j]], [ask, other])[0], together[i]), (ask, other)


def test_a_row_that_asks_nothing_keeps_every_bit():
    logits = rows(3, 60.0)
    logits[0, 5], logits[0, 6] = -0.0, -float("inf")
    assert same(masked(logits, [NONE, ASKS[2], ASKS[3]])[0], logits[0])


def test_it_keeps_what_vllms_definition_keeps():
    logits = rows(2)
    kept = masked(logits, [{"k": 20, "p": 1.0}, {"k": VOCAB, "p": 0.9}]).isfinite()
    assert kept[0].sum() == 20 and logits[0][kept[0]].min() > logits[0][~kept[0]].max()
    share = logits[1].softmax(-1)
    assert share[kept[1]].sum() >= 0.9 > share[kept[1]].sum() - share[kept[1]].min()


def test_of_tied_tokens_top_p_keeps_the_higher():
    kept = masked(torch.zeros(1, VOCAB), [{"k": VOCAB, "p": 0.125}])[0].isfinite().nonzero().flatten().tolist()
    assert kept == list(range(VOCAB - len(kept), VOCAB)) and abs(len(kept) - 125) <= 1
