"""The trainer's operators, torch.ops.bi_training.*: the sampler's bits forward, and a backward.

One file an operator: its schema, its fake, its autograd formula, and a function that takes tensors of any batch shape.
`bi_patch.training.devices` says which code runs it on which device.
"""

from bi_patch.training.ops.attention import attention
from bi_patch.training.ops.embedding import embedding
from bi_patch.training.ops.experts import experts, route
from bi_patch.training.ops.gated import gated
from bi_patch.training.ops.head import token_logprobs
from bi_patch.training.ops.linear import linear
from bi_patch.training.ops.lora import lora
from bi_patch.training.ops.norm import head_norm, rms_norm
from bi_patch.training.ops.rope import rope

__all__ = [
    "attention",
    "embedding",
    "experts",
    "gated",
    "head_norm",
    "linear",
    "lora",
    "rms_norm",
    "rope",
    "route",
    "token_logprobs",
]
