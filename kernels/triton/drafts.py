"""Checks the drafts of speculative decoding in one launch. Integers only: there is no sum whose order matters.

A request with d drafts has d + 1 rows. A draft is accepted while it equals what the row before it drew.
"""

import torch
import triton
import triton.language as tl

from .launch import Launcher


@triton.jit
def _check(drawn, inputs, edges, tokens, counts, most, BLOCK: tl.constexpr):
    request = tl.program_id(0)
    start = tl.load(edges + request).to(tl.int64)
    end = tl.load(edges + request + 1).to(tl.int64)
    place = tl.arange(0, BLOCK)
    row = tl.minimum(start + place, end - 1)
    token = tl.load(drawn + row, mask=place <= most, other=0).to(tokens.dtype.element_ty)
    within = (place < most) & (row + 1 < end)
    draft = tl.load(inputs + row + 1, mask=within, other=-1)
    accepted = within & (draft == token) & (draft >= 0)
    count = tl.min(tl.where(accepted, most, place), axis=0) + 1
    tl.store(tokens + request * (most + 1) + place, tl.where(place < count, token, -1), mask=place <= most)
    tl.store(counts + request, count)


_launch = Launcher(_check)


def check(
    drawn: torch.Tensor, inputs: torch.Tensor, edges: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new tokens of each request [requests, most + 1], -1 after the last, and their numbers, int32 [requests].

    drawn: the token of each row, integers [rows], request by request. inputs: the draft that each row follows, integers
    [rows]; -1 is never accepted, and a request's first row has none. edges: integers [requests + 1], each request's
    first row, then the number of rows. most: the largest number of drafts of a request. Tokens have the type of inputs.
    """
    requests = edges.shape[0] - 1
    tokens = inputs.new_empty((requests, most + 1))
    counts = torch.empty(requests, dtype=torch.int32, device=inputs.device)
    if requests:
        block = triton.next_power_of_2(most + 1)
        held = (drawn.contiguous(), inputs.contiguous(), edges.contiguous(), tokens, counts)
        _launch((requests, 1), held, most, (), (block,), 1)
    return tokens, counts
