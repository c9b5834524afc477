"""Sums over ranks on CUDA: in rank order, in fp32, rounded once, for every size of a message.

vLLM 0.32 and later: vLLM's one-stage all-reduce adds over peer memory, or else NCCL carries the parts and ranks add
them. NCCL itself adds two parts at most, whose sum is one (adder.py), and needs no pins. Earlier releases: upstream's
mode adds with its one-stage all-reduce, or with NCCL pinned to one algorithm and one channel. These rules turn off or
refuse whatever would take another collective. Each worker checks the order at its start.
"""

import dataclasses
import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import ranks
from bi_patch.seams.cuda import adder, leaves
from bi_patch.seams.model import Policy, Seam, Target, Variable

# What upstream's mode sets so that NCCL adds in one order.
_PINS = (
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NCCL_MIN_NCHANNELS",
    "NCCL_MAX_NCHANNELS",
    "NCCL_NTHREADS",
    "NCCL_NVLS_ENABLE",
    "NCCL_COLLNET_ENABLE",
    "NCCL_P2P_NET_DISABLE",
    "NCCL_SOCKET_NTHREADS",
)


_CARRIER = "_bi_patch_carrier"  # attribute of vLLM's CudaCommunicator
_UNEQUAL = (
    "communicator.{}: {} rows do not fall into {} equal slices. Use one device, or set BI_PATCH=0, and report this as "
    "a bug of bi_patch"
)
_LINE = 16  # elements: whole 16-byte lines of every dtype
_CARRIED = 2  # compiled ranks whose parts NCCL carried in a run
_SUMS = ">=0.32"  # releases whose one-stage all-reduce takes messages of any size


def _sum(original):
    """CudaCommunicator.all_reduce: the sum in rank order."""

    @functools.wraps(original)
    def all_reduce(self, input_):
        from bi_patch.ops.cuda import ranks as ops

        if self.world_size == 1 or not input_.is_floating_point():
            return original(self, input_)  # whole numbers have one sum
        return ops.all_reduce(input_, self.ca_comm, carrier(self), adder.adder(self))

    return all_reduce


def carrier(communicator):
    """The Carrier of vLLM's CudaCommunicator: NCCL. It is made once."""
    from bi_patch.ops.cuda.ranks import Carrier

    made = communicator.__dict__.get(_CARRIER)
    if made is None:
        nccl, group = communicator.pynccl_comm, communicator.device_group
        if nccl is not None and not nccl.disabled:
            moves = nccl.all_gather, functools.partial(_exchange, nccl)
        else:
            moves = functools.partial(_torch_gather, group), functools.partial(_torch_exchange, group)
        made = communicator.__dict__[_CARRIER] = Carrier(communicator.world_size, *moves)
    return made


def _exchange(nccl, out, x):
    """As Carrier.exchange, by vLLM's PyNcclCommunicator. Both sides leave an empty slice out."""
    nccl.group_start()
    for other in range(nccl.world_size):
        if other != nccl.rank:
            if x[other].numel():
                nccl.send(x[other], other)
            if out.numel():
                nccl.recv(out[other], other)
    nccl.group_end()
    out[nccl.rank].copy_(x[nccl.rank])


def _torch_gather(group, out, x):
    import torch.distributed as dist

    dist.all_gather_into_tensor(out.view(-1), x.view(-1), group=group)


def _torch_exchange(group, out, x):
    import torch
    import torch.distributed as dist

    given = torch.cat([part.reshape(-1) for part in x])
    sizes = [part.numel() for part in x]
    dist.all_to_all_single(out.view(-1), given, [out.shape[1]] * len(sizes), sizes, group=group)


def _scatter(original):
    """CudaCommunicator.reduce_scatter: this rank's slice of the sum in rank order."""

    @functools.wraps(original)
    def reduce_scatter(self, input_, dim=-1):
        size, left = divmod(input_.shape[dim], self.world_size)
        if left:
            raise UnsupportedFeature(_UNEQUAL.format("cuda_scatter", input_.shape[dim], self.world_size))
        total = self.all_reduce(input_)
        return total.narrow(dim, self.rank_in_group * size, size).contiguous()

    return reduce_scatter


def _scatter_unequal(original):
    """CudaCommunicator._reduce_scatterv: this rank's slice of the sum in rank order, whichever rank owns a row."""

    @functools.wraps(original)
    def _reduce_scatterv(self, input_, dim, sizes, output=None):
        from bi_patch.ops.cuda import ranks as ops

        if self.world_size == 1 or not input_.is_floating_point():
            return original(self, input_, dim, sizes, output)  # whole numbers have one sum
        rows = input_.movedim(dim, 0)
        if sizes is None:
            size, left = divmod(rows.shape[0], self.world_size)
            if left:
                raise UnsupportedFeature(_UNEQUAL.format("cuda_scatterv", rows.shape[0], self.world_size))
            sizes = [size] * self.world_size
        total = ops.reduce_scatter(rows, sizes, self.rank_in_group, carrier(self)).movedim(0, dim)
        return total.contiguous() if output is None else output.copy_(total)

    return _reduce_scatterv


def _gather_unequal(original):
    """CudaCommunicator.all_gatherv: every rank's rows, by PyTorch's NCCL where vLLM has none. Nothing is added."""

    @functools.wraps(original)
    def all_gatherv(self, input_, dim=0, sizes=None):
        nccl = self.pynccl_comm
        if self.world_size == 1 or nccl is not None and not nccl.disabled or dim:
            return original(self, input_, dim, sizes)
        if isinstance(input_, (list, tuple)):
            return [_torch_gather_unequal(self, x, sizes) for x in input_]
        return _torch_gather_unequal(self, input_, sizes)

    return all_gatherv


def _torch_gather_unequal(communicator, x, sizes):
    """Every rank's x [its size, ...], one after the other. Rows are filled up to the largest size on the way."""
    import torch

    sizes = [x.shape[0]] * communicator.world_size if sizes is None else sizes
    most = max(sizes)
    if x.shape[0] < most:
        filled = x.new_empty((most, *x.shape[1:]))
        filled[: x.shape[0]].copy_(x)
        x = filled
    out = x.new_empty((communicator.world_size, *x.shape))
    _torch_gather(communicator.device_group, out, x.contiguous())
    if min(sizes) == most:
        return out.view(-1, *x.shape[1:])
    return torch.cat([part[:size] for part, size in zip(out, sizes, strict=True)])


def _unpinned(original):
    """pin_nccl_env: NCCL adds two parts at most, so it keeps its own choice of channels and protocols."""

    @functools.wraps(original)
    def pin_nccl_env(pins):
        return None

    return pin_nccl_env


def _no_fused_norm(original):
    """_can_use_flashinfer of fused_allreduce_gemma_rms_norm: never, because it depends on the number of tokens."""

    @functools.wraps(original)
    def _can_use_flashinfer(*args, **kwargs):
        return False, 0

    return _can_use_flashinfer


_TODO = (
    "Probably NCCL was in use in this process before vLLM fixed NCCL's order, e.g. by "
    "a trainer. Leave vLLM's own all-reduce on (disable_custom_all_reduce=False); or set "
    "NCCL_ALGO=allreduce:tree, NCCL_PROTO=Simple, NCCL_MIN_NCHANNELS=1, NCCL_MAX_NCHANNELS=1 and "
    "NCCL_NVLS_ENABLE=0 before the process starts; or use one device, or set BI_PATCH=0"
)


def _carried(config, group) -> None:
    """Refuse more than two ranks that compile while NCCL carries the parts. group: vLLM's tensor-parallel group."""
    import torch

    if config.model_config.enforce_eager or group.world_size <= _CARRIED:
        return
    own = getattr(group.device_communicator, "ca_comm", None)
    whole = -(-config.model_config.get_hidden_size() // _LINE) * _LINE
    most = config.scheduler_config.max_num_batched_tokens
    # Of no memory. Rows that do not fill lines are filled up.
    largest = torch.empty((most, whole), dtype=config.model_config.dtype, device="meta")
    if own is None or own.disabled or not own.should_custom_ar(largest):
        raise UnsupportedFeature(
            f"communicator.cuda_rank_order: vLLM's one-stage all-reduce does not serve these {group.world_size} ranks, "
            f"and no run has shown more than {_CARRIED} compiled ranks while NCCL carries the parts. Use "
            "--enforce-eager, or 2, 4, 6 or 8 GPUs with peer memory and without --disable-custom-all-reduce, or set "
            "BI_PATCH=0"
        )


def _begin(config, group) -> None:
    """What a worker does before it checks the sums. group: vLLM's tensor-parallel group."""
    _carried(config, group)
    adder.certify(config, group, lambda: carrier(group.device_communicator))


def _no_fusion(config) -> None:
    passes = config.compilation_config.pass_config
    if getattr(passes, "fuse_allreduce_rms", False):
        passes.fuse_allreduce_rms = False
    found = [name for name in ("enable_sp", "fuse_gemm_comms") if getattr(passes, name, False)]
    if found and config.parallel_config.tensor_parallel_size > 1:
        raise UnsupportedFeature(
            f"communicator.fusion: with {', '.join(found)}, the number of tokens decides how ranks share a sum. "
            "Turn it off in the compilation config, or set BI_PATCH=0"
        )


_COMMUNICATOR = "vllm.distributed.device_communicators.cuda_communicator"
_START = Target(
    "vllm.v1.worker.gpu_worker",
    "init_worker_distributed_environment",
    copies=("vllm.v1.worker.cpu_worker", "vllm.v1.worker.xpu_worker"),
)

SEAMS = (
    leaves.SEAM,
    Seam(
        name="communicator.cuda_sum",
        targets=(Target(_COMMUNICATOR, "CudaCommunicator.all_reduce", releases=_SUMS),),
        close=_sum,
        why="the size of a message decides which all-reduce vLLM takes. NCCL, symmetric memory and the two-stage "
        "kernel each add in an order of their own",
        how="vLLM's one-stage all-reduce serves every size, with the last 16-byte line filled up; of two ranks, NCCL "
        "adds messages that exceed its buffer, with a certificate; where it is off, NCCL carries the parts, in one "
        "shot or two, and a bundled kernel adds them in rank order",
        until="upstream's mode adds in rank order for every size and transport",
        causes=(14,),
        op="bi_patch.ops.cuda.ranks",
        relies=("vllm.distributed.device_communicators.pynccl:PyNcclCommunicator.all_reduce",),
    ),
    Seam(
        name="communicator.cuda_scatter",
        targets=(Target(_COMMUNICATOR, "CudaCommunicator.reduce_scatter", releases=_SUMS),),
        close=_scatter,
        why="NCCL adds a reduce-scatter in an order that depends on the size of the message",
        how="each rank takes its slice of the sum in rank order",
        until="upstream's mode adds a reduce-scatter in rank order",
        causes=(14, 15),
        op="bi_patch.ops.cuda.ranks",
    ),
    Seam(
        name="communicator.cuda_scatterv",
        targets=(Target(_COMMUNICATOR, "CudaCommunicator._reduce_scatterv", releases=_SUMS),),
        close=_scatter_unequal,
        why="the number of rows of each rank decides the order in which NCCL adds unequal slices",
        how="NCCL carries the parts of a slice to the rank that keeps the slice, and a bundled kernel adds them in "
        "rank order, so which rank owns a row changes no bit",
        until="upstream's mode adds unequal slices in rank order",
        causes=(16,),
        op="bi_patch.ops.cuda.ranks",
    ),
    Seam(
        name="communicator.cuda_gatherv",
        targets=(Target(_COMMUNICATOR, "CudaCommunicator.all_gatherv", releases=">=0.33"),),
        close=_gather_unequal,
        why="where vLLM cannot load NCCL itself (e.g. beside an older PyTorch), its ranks of experts do not start",
        how="PyTorch's NCCL gathers the rows there; a gather adds nothing, so no bit depends on the way",
        until="upstream gathers rows by PyTorch's NCCL where there is no other",
        causes=(16,),
    ),
    Seam(
        name="communicator.nccl_pins",
        targets=(
            Target(
                "vllm.utils.nccl",
                "pin_nccl_env",
                releases=_SUMS,
                copies=("vllm.model_executor.determinism.batch_invariant",),
            ),
        ),
        close=_unpinned,
        why="upstream's mode slows NCCL down to one channel, because NCCL might add",
        how="NCCL keeps its own choice, because it carries parts and adds two at most (communicator.cuda_sum)",
        until="upstream's mode leaves NCCL alone where NCCL adds nothing",
        causes=(14,),
    ),
    Seam(
        name="communicator.fused_norm",
        targets=(
            Target(
                "vllm.model_executor.layers.fused_allreduce_gemma_rms_norm", "_can_use_flashinfer", releases=">=0.26"
            ),
        ),
        close=_no_fused_norm,
        why="some models add over ranks inside FlashInfer's norm, up to a number of tokens, also in upstream's mode",
        how="these models take the all-reduce and the norm that others take",
        until="upstream's mode closes this path",
        causes=(15,),
        on_import=True,
    ),
    Seam(
        name="communicator.cuda_rank_order",
        targets=(dataclasses.replace(_START, releases=_SUMS),),
        close=ranks.closing(
            "communicator.cuda_rank_order",
            True,
            "Use one device, or set BI_PATCH=0, and report this as a bug of bi_patch",
            begin=_begin,
        ),
        why="a sum over ranks must have one order for every size of the message",
        how="each worker compares sums over ranks of 1 row up to the largest step with the sum in rank order, bitwise; "
        "two ranks first compare NCCL's sums of large messages with those of the one-stage all-reduce. "
        "More than two compiled ranks whose parts NCCL carries are refused",
        until="never: this patch point checks the order",
        causes=(14,),
    ),
    Seam(
        name="communicator.cuda_order",
        targets=(dataclasses.replace(_START, releases="<0.32"),),
        close=ranks.closing("communicator.cuda_order", False, _TODO),
        why="NCCL chooses the order of a sum by the size of the message, unless upstream's mode fixes the order before "
        "the process uses NCCL",
        how="each worker compares sums over ranks of 1 row up to the largest step bitwise, and stops if the order "
        "moves",
        until="never: this patch point checks the order",
        causes=(14,),
    ),
)

VARIABLES = (
    Variable(
        name="communicator.nccl_reread",
        variable="NCCL_NO_CACHE",
        value=",".join(_PINS),
        force=False,
        why="before vLLM 0.32, NCCL may add. NCCL 2.29.7 and later reads these variables again for each communicator. "
        "So upstream's mode fixes the order although a trainer in the same process used NCCL before",
    ),
    Variable(
        name="communicator.one_stage",
        variable="VLLM_CUSTOM_ALLREDUCE_ALGO",
        value="1stage",
        why="vLLM takes its two-stage all-reduce for large messages, and this kernel sums in another order",
    ),
    Variable(
        name="communicator.symmetric_memory",
        variable="VLLM_ALLREDUCE_USE_SYMM_MEM",
        value="0",
        why="vLLM takes the symmetric-memory all-reduce for some message sizes, and the switch sums in an order of its "
        "own",
    ),
    Variable(
        name="communicator.flashinfer",
        variable="VLLM_ALLREDUCE_USE_FLASHINFER",
        value="0",
        why="vLLM takes FlashInfer's all-reduce for some message sizes only",
    ),
)

POLICIES = (
    Policy(
        name="communicator.fusion",
        apply=_no_fusion,
        why="all-reduce fused with RMSNorm and sequence parallelism sum in an order that depends on the number of "
        "tokens",
    ),
)
