"""The time left follows the pace of the finished axes and the time of the first engine start."""

from bi_patch.tools.verify.clock import Clock


def test_starts_count_and_are_no_part_of_the_pace():
    made = Clock()
    made.expect("a", 4)
    made.expect_start("engine")
    made.expect_start("another", 1.5)
    made.finish_start("engine", 20.0)
    assert made.pace == 1 and made.left() == 4 + 30
    made.finish_start("another", 10.0)
    assert made.left() == 4 and made.start() == 20


def test_the_pace_of_what_is_done_scales_the_rest():
    made = Clock()
    made.expect("a", 9)
    made.expect("b", 5)
    made.finish("a", 29.0)
    assert made.pace == 3 and made.left() == 15
    made.finish("b", 0.0)
    assert made.pace == 3 and made.left() == 0


def test_an_axis_that_takes_longer_costs_no_other_its_time():
    made = Clock()
    made.expect("a", 4)
    made.expect("b", 6)
    assert made.left("a", 1.0) == 9 and made.left("a", 100.0) == 6
