"""A double of the AscendC package: its operators, registered for the NPU and computed by the bundled kernels.

vLLM-Ascend replaces operators of torch and torch_npu with the package's. So each schema comes from the operator that is
replaced; the sum's schema has the arguments that vLLM-Ascend passes. CALLS counts the calls, so that a test can see
that the package served.
"""

from collections import Counter
from unittest import mock

import torch

from bi_patch.ops.ascend import attention, machine, products, reductions

CALLS: Counter[str] = Counter()


def _schema(name: str, like: str) -> str:
    space, _, rest = like.partition("::")
    schema = str(getattr(getattr(torch.ops, space), rest).default._schema)
    return name + schema[schema.index("(") :]


def _sum(x, dim, keepdim=False):
    return reductions.sum_dim(x, [dim], keepdim)


_FUNCTIONS = {
    "npu_mm_batch_invariant": ("aten::mm", products.mm),
    "npu_matmul_batch_invariant": ("aten::matmul", products.matmul),
    "npu_reduce_sum_batch_invariant": ("(Tensor x, int dim, bool keepdim=False) -> Tensor", _sum),
    "npu_fused_infer_attention_score_batch_invariant": (
        "npu::npu_fused_infer_attention_score",
        attention.fused_attention,
    ),
}


def _counted(name: str, function):
    def compute(*args, **kwargs):
        CALLS[name] += 1
        with mock.patch.object(machine, "ascendc", dict):  # the bundled kernels compute, not this package again
            return function(*args, **kwargs)

    return compute


_library = torch.library.Library("batch_invariant_ops", "DEF")
for _name, (_like, _function) in _FUNCTIONS.items():
    _library.define(_schema(_name, _like) if "::" in _like else _name + _like)
    _library.impl(_name, _counted(_name, _function), "PrivateUse1")
