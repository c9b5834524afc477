"""Drafts are accepted while they equal the draws, and generators end where single steps leave them."""

import random

import pytest
import torch

from bi_patch.ops import drafts


def plainly(drawn, drafted, counts):
    """The new tokens of each request, by a loop over the rows."""
    found, row, at = [], 0, 0
    for count in counts:
        tokens = [drawn[row]]
        for j in range(count):
            if drafted[at + j] != drawn[row + j]:
                break
            tokens.append(drawn[row + j + 1])
        found.append(tokens)
        row, at = row + count + 1, at + count
    return found


@pytest.mark.parametrize("seed", range(20))
def test_accepts_what_was_drawn(seed):
    source = random.Random(seed)
    counts = [source.choice((0, 0, 1, 2, 5)) for _ in range(source.randrange(1, 9))]
    drawn = [source.randrange(2) for _ in range(sum(counts) + len(counts))]
    drafted = [source.choice((0, 1, 1, -1)) for _ in range(sum(counts))]
    follows = drafts.inputs(torch.tensor(drafted, dtype=torch.int32), counts)
    ends = (torch.tensor(counts) + 1).cumsum(0)
    most = max(counts) + seed % 2
    found = drafts.check(torch.tensor(drawn), follows, ends.int(), most)
    assert found.tokens.shape == found.rows.shape == (len(counts), most + 1)
    expected = plainly(drawn, drafted, counts)
    assert found.counts.tolist() == [len(tokens) for tokens in expected]
    for i, tokens in enumerate(expected):
        assert found.tokens[i].tolist() == tokens + [-1] * (most + 1 - len(tokens))
        assert [drawn[row] for row in found.rows[i, : len(tokens)]] == tokens
        assert found.rows[i, 0] == int(ends[i]) - counts[i] - 1


def test_owners():
    assert drafts.owners([2, 0, 1], torch.device("cpu")).tolist() == [0, 0, 0, 1, 2, 2]


def test_streams_stand_where_single_steps_leave_them():
    counts, kept = [3, 0, 2, 1], [2, 1, 3, 1]
    made = {i: torch.Generator().manual_seed(i) for i in (0, 1, 2)}  # request 3 is greedy
    streams = drafts.Streams(made, counts)
    assert list(streams) == [0, 1, 2, 3, 4, 5, 6, 7]
    drawn = {row: int(torch.randint(0, 2**31, (1,), generator=g)) for row, g in streams.items()}
    streams.keep(kept)
    for request, generator in made.items():
        alone = torch.Generator().manual_seed(request)
        first = sum(counts[:request]) + request
        single = [int(torch.randint(0, 2**31, (1,), generator=alone)) for _ in range(kept[request])]
        assert single == [drawn[first + j] for j in range(kept[request])]
        assert torch.equal(generator.get_state(), alone.get_state())


def test_streams_of_a_step_that_drew_nothing():
    made = {0: torch.Generator().manual_seed(1)}
    before = made[0].get_state()
    drafts.Streams(made, [2]).keep([1])
    assert torch.equal(made[0].get_state(), before)
