"""Pooling on CUDA: means and norms of rows, each from its own sequence alone and in one order.

PyTorch's products, sums and softmax in heads are served by `linear.cuda_mode`, LayerNorm by `norm.cuda_layer`.
"""

import functools

from bi_patch.seams import pooling


def prepare(model, config) -> None:
    """Check a loaded pooling model. config: the engine's VllmConfig.

    Raises UnsupportedFeature for poolers and layers that are not covered.
    """
    if pooling.is_pooling(config):
        pooling.check(model, "pooling.cuda")


def _mean(original):
    """MeanPool.forward: one kernel adds each sequence's rows in tiles that start at the sequence's first row."""

    def forward(self, hidden_states, pooling_metadata):
        from bi_patch.ops.cuda import pooling as ops

        cursor = pooling_metadata.get_pooling_cursor()
        if cursor.is_partial_prefill() or not cursor.prompt_lens_cpu.numel():
            return original(self, hidden_states, pooling_metadata)
        starts = cursor.first_token_indices_gpu
        # The last sequence ends at the last token; the indices lie one after the other in one tensor.
        ends = cursor.last_token_indices_gpu[-1:] + 1
        return ops.mean(hidden_states, _joined(starts, ends))

    return forward


def _joined(starts, ends):
    import torch

    return torch.cat([starts, ends.to(starts.dtype)])


def _normalize(original):
    """PoolerNormalize.forward_chunk: the bundled kernel divides each row by its L2 norm."""

    def forward_chunk(self, pooled_data):
        from bi_patch.ops.cuda import pooling as ops

        return ops.normalize(pooled_data) if pooled_data.is_cuda else original(self, pooled_data)

    return forward_chunk


_seam = functools.partial(pooling.seam, "cuda")

SEAMS = (
    _seam(
        "mean",
        "seqwise.methods",
        "MeanPool.forward",
        _mean,
        "vLLM adds the rows of all sequences of the step together, by atomics, whose order is not fixed",
        "one bundled kernel adds each sequence's rows in one order",
        ("MeanPool",),
    ),
    _seam(
        "normalize",
        "activations",
        "PoolerNormalize.forward_chunk",
        _normalize,
        "PyTorch divides a reduction among blocks by the number of rows",
        "one bundled kernel sums each row's squares in one order",
        ("PoolerNormalize",),
    ),
)

POLICIES = pooling.policies("cuda")
