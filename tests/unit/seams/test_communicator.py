"""The check of each worker that ranks are added in one order. The CPU's sum itself: tests/unit/ops/ranks.py."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from bi_patch.arming.catalog import plan
from bi_patch.errors import UnsupportedFeature
from bi_patch.ops import collectives
from bi_patch.platforms import releases
from bi_patch.seams import active


def closed(name, original, platform, release=None):
    planned = plan(Version(release or releases.BY_PLATFORM[platform][-1]), platform).seams
    return next(p.seam for p in planned if p.seam.name == name).close(original)


class Ranks:
    """A double of vLLM's group of tensor-parallel ranks, whose sums are twice the tensor plus what the size adds."""

    rank_in_group, device = 0, "cpu"

    def __init__(self, world_size, large):
        self.world_size, self.large = world_size, large

    def all_reduce(self, tensor):
        return tensor * 2 + (self.large if len(tensor) > 5 else 0)


class InRankOrder(Ranks):
    """A double whose sums have the order of ranks, except in messages of one width and one dtype."""

    def __init__(self, width, dtype):
        super().__init__(4, 0)
        self.wrong = (width, dtype)

    def all_reduce(self, tensor):
        rows, width = tensor.shape
        total = collectives.in_rank_order(collectives._rows(self.world_size, width).to(tensor.dtype))
        return total.expand(rows, width) + (1 if (width, tensor.dtype) == self.wrong else 0)


def config(most=16):
    model = SimpleNamespace(get_hidden_size=lambda: 2048, dtype=torch.bfloat16)
    return SimpleNamespace(
        model_config=model, scheduler_config=SimpleNamespace(max_num_batched_tokens=most), parallel_config=None
    )


@pytest.mark.parametrize(
    "ranks, large, named", [(1, 1, ""), (4, 0, ""), (4, 1, "a message of 8 rows of 2048 elements")]
)
def test_each_worker_checks_that_the_order_is_one(ranks, large, named, monkeypatch):
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: Ranks(ranks, large))
    started = []
    start = closed("communicator.cuda_order", lambda config, *args: started.append(args), "cuda", "0.26.0")
    with pytest.raises(UnsupportedFeature, match=f"cuda_order: .*{named}") if named else contextlib.nullcontext():
        start(config(), 0, "env://")
    assert started == [(0, "env://")]


def test_each_cpu_worker_checks_that_the_order_is_by_rank(monkeypatch):
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: Ranks(4, 0))
    with pytest.raises(
        UnsupportedFeature, match="cpu_order: .*a message of 1 rows of 2048 elements in another order than by rank"
    ):
        closed("communicator.cpu_order", lambda config: None, "cpu")(config())


@pytest.mark.parametrize("leaves", [0, 8])
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ((2048, torch.bfloat16), "1 rows of 2048 elements"),
        ((2049, torch.bfloat16), "1 rows of 2049 elements"),  # rows that do not fill whole 16-byte lines
        ((2048, torch.float32), "1 rows of 2048 elements"),  # the roots of trees
        ((0, None), ""),
    ],
)
def test_each_kind_of_message_is_checked(wrong, named, leaves, monkeypatch):
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: InRankOrder(*wrong))
    monkeypatch.setattr(active, "leaves", leaves)
    refused = named and (leaves or wrong[1] is not torch.float32)
    with pytest.raises(UnsupportedFeature, match=f"cpu_order: .*{named}") if refused else contextlib.nullcontext():
        closed("communicator.cpu_order", lambda config: None, "cpu")(config())


def test_norms_fused_with_the_sum_are_closed():
    assert closed("communicator.fused_norm", None, "cuda")(torch.ones(2), 2) == (False, 0)
