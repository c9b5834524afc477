"""Sums over ranks on CPU: shared memory or gloo carries the parts, and every rank adds them in rank order."""

import functools

from bi_patch.seams import ranks
from bi_patch.seams.model import Seam, Target


def _sum(original):
    """CpuCommunicator.all_reduce, which writes the sum into its argument.

    vLLM's sum over shared memory starts with the rank's own part, in fp32, and rounds once: for two ranks this is the
    sum in rank order. gloo adds in a ring, and rounds each addition.
    """

    @functools.wraps(original)
    def all_reduce(self, input_):
        import torch

        from bi_patch.ops import collectives

        if not input_.is_floating_point():
            return original(self, input_)
        if self.world_size == 2 and self.supports_tensor_dict:  # over shared memory
            return original(self, input_)
        own = input_.contiguous().view(-1)
        parts = torch.empty(self.world_size * own.numel(), dtype=own.dtype, device=own.device)
        self.dist_module.all_gather_into_tensor(parts, own, group=self.device_group)
        input_.copy_(collectives.in_rank_order(parts.view(self.world_size, *input_.shape)))
        return input_

    return all_reduce


SEAMS = (
    Seam(
        name="communicator.cpu_sum",
        targets=(Target("vllm.distributed.device_communicators.cpu_communicator", "CpuCommunicator.all_reduce"),),
        close=_sum,
        why="over shared memory, each of more than two ranks adds the parts from its own part on; gloo adds in a ring, "
        "whose order depends on the place in the message",
        how="the parts are gathered and added in rank order, in fp32, with one rounding; two ranks over shared memory "
        "keep vLLM's sum, which has the same bits",
        until="upstream's CPU all-reduce adds in rank order over shared memory and gloo",
        causes=(14,),
        op="bi_patch.ops.collectives",
    ),
    Seam(
        name="communicator.cpu_order",
        targets=(
            Target(
                "vllm.v1.worker.gpu_worker",
                "init_worker_distributed_environment",
                copies=("vllm.v1.worker.cpu_worker", "vllm.v1.worker.xpu_worker"),
            ),
        ),
        close=ranks.closing(
            "communicator.cpu_order", True, "Use one rank, or set BI_PATCH=0, and report this as a bug of bi_patch"
        ),
        why="a sum over ranks must have one order for every size of the message",
        how="each worker compares sums over ranks of 1 row up to the largest step with the sum in rank order, bitwise",
        until="never: this patch point checks the order",
        causes=(14,),
    ),
)
