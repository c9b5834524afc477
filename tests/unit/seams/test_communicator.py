"""Sums over ranks: the seams of CPU and CUDA with doubles of vLLM's communicators, and the check of each worker."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from bi_patch.arming.catalog import plan
from bi_patch.errors import UnsupportedFeature
from bi_patch.ops import bits, collectives
from bi_patch.platforms import releases
from bi_patch.seams import active, agreement, stages
from bi_patch.seams import ranks as seams_ranks


@pytest.fixture(autouse=True)
def _agreed(monkeypatch):
    """The doubles are no real ranks, which test_agreement.py and test_stages.py have."""
    monkeypatch.setattr(agreement, "check", lambda name, group: None)
    monkeypatch.setattr(agreement, "together", lambda group, own: _raise(own) if own else None)
    monkeypatch.setattr(agreement, "every", lambda group, own: own)
    monkeypatch.setattr(stages, "watch", lambda world: None)
    monkeypatch.setattr("vllm.distributed.parallel_state.get_world_group", lambda: None)


def closed(name, original, platform, release=None):
    planned = plan(Version(release or releases.BY_PLATFORM[platform][-1]), platform).seams
    return next(p.seam for p in planned if p.seam.name == name).close(original)


def _raise(error):
    raise error


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


def config(most=16, eager=True, width=2048):
    model = SimpleNamespace(get_hidden_size=lambda: width, dtype=torch.bfloat16, enforce_eager=eager)
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


@pytest.mark.parametrize(
    "platform, name", [("cuda", "communicator.cuda_rank_order"), ("cpu", "communicator.cpu_order")]
)
def test_each_worker_checks_that_the_order_is_by_rank(platform, name, monkeypatch):
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: Ranks(4, 0))
    with pytest.raises(
        UnsupportedFeature, match=f"{name}: .*a message of 1 rows of 2048 elements in another order than by rank"
    ):
        closed(name, lambda config: None, platform)(config())


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


def _own(disabled, serves):
    return SimpleNamespace(disabled=disabled, should_custom_ar=lambda x: serves and x.nbytes % 16 == 0)


@pytest.mark.parametrize("width", [2048, 2051])  # rows of 2051 are filled up
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("own", [None, _own(True, True), _own(False, False), _own(False, True)])
def test_more_than_two_compiled_ranks_need_the_one_stage_all_reduce(own, ranks, eager, width, monkeypatch):
    """No run has shown CUDA graphs in which NCCL carries the parts of more ranks; a worker knows whether it will."""
    from vllm.distributed import parallel_state

    group = InRankOrder(0, None)
    group.world_size, group.device_communicator = ranks, SimpleNamespace(ca_comm=own)
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: group)
    served = ranks == 2 or eager or (own is not None and not own.disabled and own.should_custom_ar(torch.empty(8)))
    start = closed("communicator.cuda_rank_order", lambda config: "started", "cuda")
    with (
        contextlib.nullcontext()
        if served
        else pytest.raises(UnsupportedFeature, match="cuda_rank_order: .* 4 ranks.*compiled.*NCCL.*--enforce-eager")
    ):
        assert start(config(eager=eager, width=width)) == "started"


@pytest.mark.parametrize("wrong", [None, (2048, torch.bfloat16)])
def test_all_ranks_of_the_world_agree_on_each_check(wrong, monkeypatch):
    """Ranks of another tensor-parallel group, whose sums are right, would wait in the next check."""
    from vllm.distributed import parallel_state

    held, asked = _of_experts(4), []
    monkeypatch.setattr(parallel_state, "get_world_group", lambda: "world")
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: InRankOrder(*wrong or (0, None)))
    monkeypatch.setattr(parallel_state, "get_dp_group", lambda: Sharing(None))
    monkeypatch.setattr(agreement, "together", lambda group, own: asked.append((group, own is None)))
    closed("communicator.cuda_rank_order", lambda config: None, "cuda")(held)
    assert asked == [("world", True), ("world", wrong is None), ("world", True)]


class OneStage:
    """A double of vLLM's CustomAllreduce: three ranks with parts x, 2x and 3x, and messages of whole lines only."""

    disabled = False

    def __init__(self):
        self.taken = []

    def should_custom_ar(self, x):
        return x.is_contiguous() and x.numel() * x.element_size() % 16 == 0

    def custom_all_reduce(self, x):
        self.taken.append(tuple(x.shape))
        return collectives.in_rank_order(torch.stack([x, 2 * x, 3 * x]))


def communicator(own):
    def gather(out, x):
        out.copy_(torch.stack([x, 2 * x, 3 * x]))

    nccl = SimpleNamespace(disabled=False, all_gather=gather)
    return SimpleNamespace(world_size=3, rank_in_group=1, ca_comm=own, pynccl_comm=nccl, device_group=None)


def _summed(monkeypatch, own, x):
    def never(*_):
        raise AssertionError("NCCL or another library would add")

    # The bundled kernel needs a GPU; its own test compares it with this sum.
    monkeypatch.setitem(
        __import__("sys").modules,
        "bi_patch.kernels.triton.ranks",
        SimpleNamespace(rank_sum=collectives.in_rank_order),
    )
    return closed("communicator.cuda_sum", never, "cuda")(communicator(own), x)


@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (1, 1), (3, 1001), (5, 2052), (0, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_size_is_summed_in_rank_order(monkeypatch, shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = collectives.in_rank_order(torch.stack([x, 2 * x, 3 * x]))
    own = OneStage()
    for held in (own, None, SimpleNamespace(disabled=True)):
        got = _summed(monkeypatch, held, x)
        assert got.shape == x.shape and got.dtype == dtype and not bits.differing(got, want)
    whole = x.numel() * x.element_size() % 16 == 0
    assert own.taken == ([shape] if whole else [(-(-x.numel() * x.element_size() // 16) * 16 // x.element_size(),)])


def test_a_transposed_message_is_summed(monkeypatch):
    x = torch.randn(6, 8).bfloat16().T
    want = collectives.in_rank_order(torch.stack([x, 2 * x, 3 * x]))
    assert not bits.differing(_summed(monkeypatch, OneStage(), x), want)


def test_whole_numbers_and_one_rank_keep_vllms_sum():
    original = lambda self, x: x + 1  # noqa: E731
    one = SimpleNamespace(world_size=1)
    assert closed("communicator.cuda_sum", original, "cuda")(one, torch.ones(2)).tolist() == [2, 2]
    several = communicator(OneStage())
    assert closed("communicator.cuda_sum", original, "cuda")(several, torch.ones(2).int()).tolist() == [2, 2]


def test_a_scattered_sum_is_a_slice_of_the_sum():
    held = communicator(OneStage())
    held.all_reduce = held.ca_comm.custom_all_reduce
    x = torch.randn(4, 6)
    got = closed("communicator.cuda_scatter", None, "cuda")(held, x, 1)
    assert torch.equal(got, collectives.in_rank_order(torch.stack([x, 2 * x, 3 * x]))[:, 2:4])


def test_a_sum_that_does_not_fall_into_slices_is_refused():
    with pytest.raises(UnsupportedFeature, match="cuda_scatter: 7 rows .* 3 equal slices"):
        closed("communicator.cuda_scatter", None, "cuda")(communicator(OneStage()), torch.randn(4, 7), 1)


class Exchange:
    """A double of vLLM's PyNcclCommunicator for the second of three ranks, which sends x of x, 2x and 3x."""

    disabled, rank, world_size = False, 1, 3

    def __init__(self):
        self.group_start = self.group_end = lambda: None

    def all_gather(self, out, x):
        raise AssertionError("every rank would get every slice")

    def send(self, x, other):
        self.sent = x

    def recv(self, out, other):
        out.copy_(self.own * (other + 1) / 2)


@pytest.mark.parametrize("sizes", [[1, 4, 2], [0, 7, 0], None])
@pytest.mark.parametrize("given", [False, True])
def test_unequal_slices_are_summed_in_rank_order(monkeypatch, sizes, given):
    held = communicator(None)
    held.pynccl_comm = Exchange()
    rows = torch.randn(sum(sizes or [6]), 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    own = rows.split(sizes or [2, 2, 2])[1]
    held.pynccl_comm.own = own.reshape(-1)
    monkeypatch.setitem(
        __import__("sys").modules,
        "bi_patch.kernels.triton.ranks",
        SimpleNamespace(rank_sum=collectives.in_rank_order),
    )
    output = torch.empty_like(own) if given else None
    got = closed("communicator.cuda_scatterv", None, "cuda")(held, rows, 0, sizes, output)
    assert not bits.differing(got, collectives.in_rank_order(torch.stack([own / 2, own, own * 1.5])))
    assert not given or got is output


def test_slices_of_one_rank_and_of_whole_numbers_keep_vllms_sum():
    original = lambda self, x, dim, sizes, output: x[1:]  # noqa: E731
    for held, x in ((SimpleNamespace(world_size=1), torch.ones(3)), (communicator(None), torch.ones(3).int())):
        assert closed("communicator.cuda_scatterv", original, "cuda")(held, x, 0, [1, 2]).tolist() == [1, 1]
    with pytest.raises(UnsupportedFeature, match="cuda_scatterv: 7 rows .* 3 equal slices"):
        closed("communicator.cuda_scatterv", original, "cuda")(communicator(None), torch.ones(7, 2), 0, None)


class Sharing(Ranks):
    """A double of vLLM's group of data-parallel ranks, which keep slices of a sum: in rank order, or not."""

    def __init__(self, wrong):
        super().__init__(4, 0)
        self.wrong = wrong

    def reduce_scatterv(self, rows, dim, sizes):
        total = collectives.in_rank_order(collectives._rows(4, rows.shape[1]).to(rows.dtype))
        return total.expand(sizes[0], rows.shape[1]) + (1 if sizes == self.wrong else 0)


@pytest.mark.parametrize(
    ("experts", "wrong"), [(True, None), (True, [16] * 4), (True, [4, 8, 12, 16]), (False, [1] * 4)]
)
@pytest.mark.parametrize("split", [False, True])
def test_each_worker_checks_slices_of_ranks_that_share_experts(experts, wrong, split, monkeypatch):
    from vllm.distributed import parallel_state

    held = config()
    held.model_config.is_moe = experts
    held.parallel_config = SimpleNamespace(data_parallel_size=4, use_sequence_parallel_moe=split)
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: Ranks(1, 0))
    monkeypatch.setattr(parallel_state, "get_ep_group" if split else "get_dp_group", lambda: Sharing(wrong))
    said = pytest.raises(UnsupportedFeature, match="cuda_rank_order: 4 ranks that share experts .*than by rank")
    with said if wrong and experts else contextlib.nullcontext():
        closed("communicator.cuda_rank_order", lambda config: None, "cuda")(held)


def _of_experts(ranks):
    held = config()
    held.model_config.is_moe = True
    held.parallel_config = SimpleNamespace(data_parallel_size=ranks, tensor_parallel_size=2)
    return held


def test_experts_are_certified_for_the_rows_of_all_ranks():
    assert seams_ranks.others(_of_experts(1)) == 0 and seams_ranks.others(_of_experts(4)) == 3 * (16 + 2)


@pytest.mark.parametrize(
    ("failed", "named"), [({}, ""), ({0: "b", 1: "b"}, ""), ({1: "b"}, "other certificates .b."), ({0: "b"}, "b")]
)
@pytest.mark.parametrize("split", [False, True])
def test_ranks_that_share_experts_have_the_same_certificates(split, failed, named, monkeypatch):
    """Any of these ranks may serve a row, and a failed certificate lets another kernel serve. Where tensor-parallel
    ranks split the rows of experts (split), a row's place in the step decides which of them serves the row."""
    import torch.distributed as dist

    made = [
        [SimpleNamespace(key=SimpleNamespace(problem=p), passed=failed.get(rank) != p) for p in "ab"] for rank in (0, 1)
    ]

    def gather(said, own, group):
        said[:] = [sorted(c.key.problem for c in held if not c.passed) for held in made]
        assert own == said[0]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(
        f"vllm.distributed.parallel_state.get_{'ep' if split else 'dp'}_group",
        lambda: SimpleNamespace(world_size=2, cpu_group=None),
    )
    held = _of_experts(2)
    held.parallel_config.use_sequence_parallel_moe = split
    with pytest.raises(UnsupportedFeature, match=f"linear.x: 2 .*{named}") if named else contextlib.nullcontext():
        seams_ranks.alike("linear.x", held, lambda: made[0])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_without_certificates_tells_the_others(ranks, monkeypatch):
    def fail():
        raise UnsupportedFeature("no certificate")

    told = []
    monkeypatch.setattr("vllm.distributed.parallel_state.get_world_group", lambda: "world")
    monkeypatch.setattr("vllm.distributed.parallel_state.get_dp_group", lambda: None)
    monkeypatch.setattr(agreement, "together", lambda group, own: told.append((group, str(own))) or _raise(own))
    with pytest.raises(UnsupportedFeature, match="no certificate"):
        seams_ranks.alike("linear.x", _of_experts(ranks), fail)
    assert told == ([("world", "no certificate")] if ranks > 1 else [])


def test_vllms_own_nccl_gathers_rows():
    """PyTorch gathers only where vLLM could not load NCCL."""
    original = lambda self, x, dim, sizes: (x, dim, sizes)  # noqa: E731
    gather = closed("communicator.cuda_gatherv", original, "cuda")
    for held in (communicator(None), SimpleNamespace(world_size=1, pynccl_comm=None)):
        assert gather(held, "x", sizes=[1, 2, 3]) == ("x", 0, [1, 2, 3])


def test_fused_norms_and_pins():
    assert closed("communicator.fused_norm", None, "cuda")(torch.ones(2), 2) == (False, 0)
    assert closed("communicator.nccl_pins", None, "cuda")({"NCCL_ALGO": "tree"}) is None


@pytest.mark.parametrize("place", [0, 1, 2], ids=["begin", "whole", "slices"])
def test_an_error_between_messages_is_not_brought_to_the_ranks_that_wait_for_the_next(place, monkeypatch):
    """They would wait in a sum, and this rank in an exchange. They hear of it elsewhere (test_stages.py)."""
    told, checks = [], [lambda *given: None] * 3

    def without_memory(*given):
        raise MemoryError

    checks[place] = without_memory
    monkeypatch.setattr(agreement, "together", lambda world, own: told.append(own))
    monkeypatch.setattr("vllm.distributed.parallel_state.get_tp_group", lambda: SimpleNamespace(world_size=2))
    monkeypatch.setattr(seams_ranks, "_sharing", lambda config: "group")
    monkeypatch.setattr(seams_ranks, "_whole", checks[1])
    monkeypatch.setattr(seams_ranks, "_slices", checks[2])
    with pytest.raises(MemoryError):
        seams_ranks._check(None, "communicator.order", True, "", checks[0])
    assert told == [None] * place
