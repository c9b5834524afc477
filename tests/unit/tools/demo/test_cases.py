"""The rounds that the demo runs."""

import pytest

from bi_patch.tools.demo import cases, prompts

NAMES = [s.name for s in prompts.SUBJECTS]
SUBJECTS = [tuple(range(10, 10 + n)) for n in (5, 30, 90, 130, 300, 900)]
FILLERS = [tuple(range(n, 2 * n + 3)) for n in range(len(prompts.FILLERS))]


@pytest.fixture(params=[False, True], ids=["full", "quick"])
def plan(request):
    return cases.make(NAMES, SUBJECTS, FILLERS, quick=request.param)


def test_every_slot_has_its_reference_before_it(plan):
    known = set()
    for current in plan.rounds:
        for slot in current.slots:
            if slot.subject is None:
                continue
            key = (slot.subject, slot.kind)
            if current.is_reference:
                assert len(current.slots) == 1 and key not in known
                known.add(key)
            assert key in known


def test_a_slot_asks_what_its_reference_asked(plan):
    asked = {}
    for current in plan.rounds:
        for slot in current.slots:
            if slot.subject is not None:
                assert asked.setdefault((slot.subject, slot.kind), slot.request) == slot.request


def test_batches_have_the_size_they_say(plan):
    sizes = set()
    for current in plan.rounds:
        if current.column.startswith("batch of ") and len(current.slots) != 3:
            sizes.add(len(current.slots))
            assert current.column == f"batch of {len(current.slots)}"
    assert 16 in sizes


def test_only_seeded_prompts_over_a_chunk_may_stop_stock():
    plan = cases.make(NAMES, SUBJECTS, FILLERS)
    stopping = [r for r in plan.rounds if r.may_stop]
    assert stopping and plan.rounds[-len(stopping) :] == tuple(stopping)
    safe = [r for r in plan.rounds if r.column == "seeded"]
    assert sum(len(s.request.prompt) for r in safe for s in r.slots) <= cases.CHUNK


def test_the_texts_are_varied_and_distinct():
    lengths = [len(s.text) for s in prompts.SUBJECTS]
    assert len(lengths) >= 6 and min(lengths) < 40 and max(lengths) > 3000
    assert len(set(prompts.FILLERS)) == len(prompts.FILLERS)
