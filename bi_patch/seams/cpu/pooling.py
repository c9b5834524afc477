"""Pooling on CPU: means, norms, softmax and heads, each row from its own sequence alone and in one order."""

import functools

from bi_patch.seams import pooling


def prepare(model, config) -> None:
    """Check a loaded pooling model, and give its heads the bundled GEMM. config: the engine's VllmConfig.

    Raises UnsupportedFeature for poolers and layers that are not covered.
    """
    import torch

    from bi_patch.ops.cpu import dense

    if not pooling.is_pooling(config):
        return
    pooling.check(model, "pooling.cpu")
    for layer in pooling.modules(model):
        if type(layer) is torch.nn.Linear:
            dense.take(layer)


def _mean(original):
    """MeanPool.forward: each sequence's rows are added in ascending order, and no other rows enter."""

    def forward(self, hidden_states, pooling_metadata):
        from bi_patch.ops.cpu import pooling as ops

        cursor = pooling_metadata.get_pooling_cursor()
        if cursor.is_partial_prefill() or not cursor.prompt_lens_cpu.numel():
            return original(self, hidden_states, pooling_metadata)
        return ops.mean(hidden_states, cursor.prompt_lens_cpu)

    return forward


def _normalize(original):
    """PoolerNormalize.forward_chunk: the bundled kernel divides each row by its L2 norm."""

    def forward_chunk(self, pooled_data):
        from bi_patch.ops.cpu import machine
        from bi_patch.ops.cpu import pooling as ops

        return ops.normalize(pooled_data) if machine.covers(pooled_data) else original(self, pooled_data)

    return forward_chunk


def _classify(original):
    """PoolerClassify.forward_chunk: the bundled softmax serves several labels; vLLM's sigmoid serves one."""

    def forward_chunk(self, pooled_data):
        from bi_patch.ops.cpu import machine
        from bi_patch.ops.cpu import pooling as ops

        labels = self.num_labels if self.num_labels is not None else pooled_data.shape[-1]
        if labels < 2 or not machine.covers(pooled_data):
            return original(self, pooled_data)
        return ops.softmax(pooled_data)

    return forward_chunk


_seam = functools.partial(pooling.seam, "cpu")
_BLOCKS = "PyTorch divides a reduction among threads and blocks by the number of rows"

SEAMS = (
    _seam(
        "mean",
        "seqwise.methods",
        "MeanPool.forward",
        _mean,
        "vLLM adds the rows of all sequences of the step together",
        "one bundled kernel adds each sequence's rows in ascending order",
        ("MeanPool",),
    ),
    _seam(
        "normalize",
        "activations",
        "PoolerNormalize.forward_chunk",
        _normalize,
        _BLOCKS,
        "one bundled kernel sums each row's squares in one order",
        ("PoolerNormalize",),
    ),
    _seam(
        "softmax",
        "activations",
        "PoolerClassify.forward_chunk",
        _classify,
        _BLOCKS,
        "one bundled kernel serves, with one order for each row",
        ("PoolerClassify",),
    ),
)

POLICIES = pooling.policies("cpu")
