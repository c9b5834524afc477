"""A rewindable generator can undo its last seeded draw, and no earlier draw."""

import torch

from bi_patch.ops.cpu import draws


def draw(generator):
    return int(torch.randint(0, 2**31, (1,), generator=generator))


def test_a_taken_back_draw_leaves_no_trace():
    plain, twin = torch.Generator(), torch.Generator()
    plain.manual_seed(11), twin.manual_seed(11)
    ours = draws.rewindable(twin)
    expected = [draw(plain) for _ in range(3)]
    for value in expected:
        for _ in range(2):  # two chunks of a prompt: each draws and undoes the draw
            draws.remember([ours])
            draw(ours)
            ours.set_offset(ours.get_offset() - 4)
        draws.remember([ours, plain])
        assert draw(ours) == value


def test_taking_back_twice_is_once():
    ours = draws.rewindable(torch.Generator().manual_seed(3))
    ours.remember()
    first = draw(ours)
    ours.set_offset(0)
    ours.set_offset(0)
    assert draw(ours) == first


def test_a_rewindable_generator_stays_itself():
    ours = draws.rewindable(torch.Generator())
    assert draws.rewindable(ours) is ours
