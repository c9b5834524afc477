"""Seeds: random, or derived from a request and from the number of identical requests before it."""

import enum
import random
from dataclasses import dataclass

import pytest
import torch

from bi_patch.ops import seeds


def test_drawn_seeds_are_exact_in_json_and_differ():
    found = [seeds.drawn() for _ in range(100)]
    assert len(set(found)) == 100 and all(0 <= seed < 2**52 for seed in found)


def next_seed(table, *request):
    return table.seed(table.key(*request))


def test_eight_identical_requests_have_the_same_set_of_seeds_in_any_company():
    alone = seeds.Derived(0)
    expected = [next_seed(alone, [1, 2, 3], {"temperature": 1.0}) for _ in range(8)]
    assert len(set(expected)) == 8
    for order in range(5):
        requests = [[1, 2, 3]] * 8 + [[i] for i in range(50)] + [[4]] * 5
        random.Random(order).shuffle(requests)
        table = seeds.Derived(0)
        found = [(r, next_seed(table, r, {"temperature": 1.0})) for r in requests]
        assert [seed for r, seed in found if r == [1, 2, 3]] == expected


def test_the_engine_seed_and_every_part_count():
    parts = ([1, 2], None, {"temperature": 1.0, "top_p": 0.9}, {"a", "b"})
    first = next_seed(seeds.Derived(0), *parts)
    assert next_seed(seeds.Derived(0), [1, 2], None, {"top_p": 0.9, "temperature": 1.0}, {"b", "a"}) == first
    assert next_seed(seeds.Derived(1), *parts) != first
    for changed in (
        ([1, 3], *parts[1:]),
        (parts[0], "salt", *parts[2:]),
        (*parts[:2], {"temperature": 1.0, "top_p": 0.91}, parts[3]),
        (*parts[:3], {"a"}),
    ):
        assert next_seed(seeds.Derived(0), *changed) != first


def test_beyond_the_bound_the_request_not_seen_for_longest_counts_from_0_again():
    table = seeds.Derived(0, remembered=2)
    first, second = next_seed(table, "a"), next_seed(table, "a")
    next_seed(table, "b")
    assert next_seed(table, "a") not in (first, second)  # two different requests are remembered
    next_seed(table, "c")  # "b" is forgotten
    next_seed(table, "d")  # "a" is forgotten
    assert next_seed(table, "a") == first


@dataclass
class Fields:
    shown: int
    _hidden: int = 0


class Kind(enum.Enum):
    ONE = 1


def test_parts_are_told_apart_by_type_and_nesting():
    values = [
        1, "1", b"1", 1.0, True, None, [1], [[1]], [1, 1], [1, [1]], {1: 1}, {1}, Fields(1), Kind.ONE, [],
        torch.ones(2), torch.ones(2, dtype=torch.bfloat16), torch.ones(2, 1), 0.0, -0.0,
    ]  # fmt: skip
    assert len({seeds.digest(value) for value in values}) == len(values)
    assert seeds.digest([1], [2]) != seeds.digest([1, 2])
    assert seeds.digest(Fields(1, 5)) == seeds.digest(Fields(1, 6))
    with pytest.raises(TypeError, match="from which no seed can be derived"):
        seeds.digest(object())
