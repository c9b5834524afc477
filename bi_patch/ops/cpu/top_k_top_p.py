"""Top-k and top-p of logits on CPU: a row is masked only if its own request asks, and in one order of its own tokens.

The order of a row: top-k keeps the logits that are not below the k-th largest. Top-p sorts the row in ascending order,
of tied logits the lower token first, adds the probabilities one after the other in fp32, and drops the tokens whose sum
is at most 1 - p. The largest logit always stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def mask(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    """Set the logits [rows, V] (fp32) that top-k and top-p drop to minus infinity, in place. Returns `logits`.

    k: the number of tokens kept in each row (integers [rows]), V for a row without top-k; None for no top-k at all.
    p: the share of probability kept in each row (fp32 [rows]), 1 for a row without top-p; None for no top-p at all.
    Rows without top-k and top-p keep every bit.
    """
    if k is not None:
        _of_rows(logits, k < logits.shape[1], k, _top_k)
    if p is not None:
        _of_rows(logits, p < 1, p, _top_p)
    return logits


def _of_rows(logits, asked, limits, change) -> None:
    """Apply `change` (rows of logits, their limits) to the rows that `asked` [rows] selects."""
    rows = asked.nonzero().flatten()
    if len(rows):
        logits.index_copy_(0, rows, change(logits.index_select(0, rows), limits[rows]))


def _top_k(x, k):
    at = k.long().unsqueeze(1) - 1
    least = x.topk(int(k.max()), dim=1).values.gather(1, at)
    return x.masked_fill_(x < least, -float("inf"))


def _top_p(x, p):
    # Without `stable`, the algorithm decides which of tied tokens stays.
    ordered, tokens = x.sort(dim=-1, stable=True)
    sums = ordered.softmax(dim=-1).cumsum(dim=-1)
    dropped = sums <= 1 - p.unsqueeze(1)
    dropped[:, -1] = False
    return x.scatter_(-1, tokens, ordered.masked_fill_(dropped, -float("inf")))
