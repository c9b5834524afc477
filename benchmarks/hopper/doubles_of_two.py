"""Doubles of vLLM's communicators over gloo, for a trial of two_ranks.py on CPU."""

import torch
import torch.distributed as dist

torch.cuda.is_current_stream_capturing = lambda: False  # a build for CPU has none


class One:
    """As vLLM's CustomAllreduce."""

    disabled = mnnvl_only = False

    def __init__(self, group, device, max_size=1 << 14):
        self.max_size = max_size

    def should_custom_ar(self, x):
        return x.nbytes % 16 == 0

    def custom_all_reduce(self, x):
        parts = torch.empty((2, *x.shape), dtype=x.dtype)
        dist.all_gather(list(parts.unbind()), x.contiguous())
        total = (parts[0].float() + parts[1].float()).to(x.dtype)
        return torch.where(total.isnan(), float("nan"), total)  # on a GPU, all NaN of sums have the same bits


class Nccl:
    """As vLLM's PyNcclCommunicator."""

    disabled = False

    def __init__(self, group, device):
        self.all_reduce = One(group, device).custom_all_reduce

    def all_gather(self, out, x):
        dist.all_gather(list(out.view(2, -1).unbind()), x.reshape(-1))
