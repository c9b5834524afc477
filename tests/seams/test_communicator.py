"""Policies of collectives between ranks."""

from types import SimpleNamespace

import pytest

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.communicator import POLICIES

WIDTH = next(policy for policy in POLICIES if policy.name == "communicator.width")


def config(width: int, ranks: int, without_kernel: bool = False):
    parallel = SimpleNamespace(tensor_parallel_size=ranks, disable_custom_all_reduce=without_kernel)
    return SimpleNamespace(model_config=SimpleNamespace(get_hidden_size=lambda: width), parallel_config=parallel)


@pytest.mark.parametrize("width, ranks, without_kernel", [(2048, 4, False), (2052, 1, False), (2052, 4, True)])
def test_one_kernel_for_every_message(width, ranks, without_kernel):
    WIDTH.apply(config(width, ranks, without_kernel))


def test_rows_of_broken_lines_are_refused():
    with pytest.raises(UnsupportedFeature, match="communicator.width: rows of 2052 elements"):
        WIDTH.apply(config(2052, 2))
