"""Rotary embedding: compiled and eager code give the same bits in every batch."""

import functools

from bi_patch.seams.rotations import CLASSES, seam


def _rotary(original):
    """RotaryEmbedding.forward_cpu and forward_native: call the bundled kernel in compiled and in eager code."""
    from bi_patch.ops.cpu import rotary

    def forward(self, positions, query, key=None):
        if positions.ndim != 1 or type(self).__name__ not in CLASSES:
            return original(self, positions, query, key)
        cache = self._match_cos_sin_cache_dtype(query)

        def turn(x):
            return rotary.rope(positions, x, cache, self.head_size, self.is_neox_style)

        return turn(query), None if key is None else turn(key)

    return forward


def _sections(original):
    """MRotaryEmbedding.forward_native: call the same kernel on rows of cosines and sines that each token's positions
    of time, height and width choose."""
    import torch

    from bi_patch.ops.cpu import rotary

    @functools.wraps(original)
    def forward_native(self, positions, query, key=None, offsets=None):
        sections = self.mrope_section or ()
        if offsets is not None or type(self).__name__ != "MRotaryEmbedding" or positions.ndim == 2 and not sections:
            return original(self, positions, query, key, offsets)
        cache = self._match_cos_sin_cache_dtype(query)
        if positions.ndim == 2:
            cache = rotary.sections(positions, cache, tuple(sections), bool(self.mrope_interleaved))
            positions = torch.arange(cache.shape[0])

        def turn(x):
            return rotary.rope(positions, x, cache, self.head_size, self.is_neox_style)

        return turn(query), None if key is None else turn(key)

    return forward_native


def _latent(original):
    """DeepseekScalingRotaryEmbedding.forward_native, of MLA's keys and queries: call the same kernel."""
    from bi_patch.ops.cpu import rotary

    @functools.wraps(original)
    def forward_native(self, positions, query, key=None, offsets=None):
        if offsets is not None or positions.ndim != 1 or type(self).__name__ != "DeepseekScalingRotaryEmbedding":
            return original(self, positions, query, key, offsets)
        cache = self._match_cos_sin_cache_dtype(query)

        def turn(x):
            return rotary.rope(positions, x, cache, self.head_size, self.is_neox_style)

        return turn(query), None if key is None else turn(key)

    return forward_native


_DEEPSEEK = "vllm.model_executor.layers.rotary_embedding.deepseek_scaling_rope"
_MROPE = "vllm.model_executor.layers.rotary_embedding.mrope"
_SERVES = ("RotaryEmbedding", "RotaryEmbeddingBase")

SEAMS = (
    seam("cpu_forward", "RotaryEmbedding.forward_cpu", _rotary, serves=_SERVES),
    seam("cpu_native", "RotaryEmbedding.forward_native", _rotary),
    seam("cpu_sections", "MRotaryEmbedding.forward_native", _sections, _MROPE),
    seam("cpu_latent", "DeepseekScalingRotaryEmbedding.forward_native", _latent, _DEEPSEEK),
)
