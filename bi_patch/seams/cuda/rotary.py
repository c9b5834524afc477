"""Rotary embedding: compiled and eager code give the same bits in every batch."""

from bi_patch.seams.model import Seam, Target
from bi_patch.seams.rotations import CLASSES, seam


def _rotary(original):
    """RotaryEmbedding.forward_cuda and forward_native: call the bundled kernel in compiled and in eager code."""
    from bi_patch.ops.cuda import rotary

    rotary.define_op()

    def forward(self, positions, query, key=None):
        if key is None or positions.ndim != 1 or not _covers(self):
            return original(self, positions, query, key)
        cache = self._match_cos_sin_cache_dtype(query)
        return rotary.rope(positions, query, key, cache, self.head_size)

    return forward


def _sections(original):
    """MRotaryEmbedding.forward_native, which is what vLLM compiles: call vLLM's own kernel, as eager code does."""
    import torch

    def forward(self, positions, query, key=None, offsets=None):
        if positions.ndim != 2 or offsets is not None or len(self.mrope_section or ()) != 3:
            return original(self, positions, query, key, offsets)
        query, key = query.clone(), key.clone()  # the kernel writes in place
        sizes = (self.head_size, self.rotary_dim, *self.mrope_section, self.mrope_interleaved, self.is_neox_style)
        torch.ops.vllm.mrope(positions, query, key, self._match_cos_sin_cache_dtype(query), *sizes)
        return query, key

    return forward


def _qk_norm(original):
    """Qwen3's attention: normalize query and key heads and rotate them in one launch, as fast as stock vLLM."""
    from bi_patch.ops.cuda import rotary

    rotary.define_op()

    def forward(self, positions, hidden_states):
        if positions.ndim != 1 or not _covers(self.rotary_emb):
            return original(self, positions, hidden_states)
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        cache = self.rotary_emb._match_cos_sin_cache_dtype(q)
        q, k = rotary.rope(
            positions,
            q,
            k,
            cache,
            self.head_dim,
            self.q_norm.weight.data,
            self.k_norm.weight.data,
            self.q_norm.variance_epsilon,
        )
        output, _ = self.o_proj(self.attn(q, k, v))
        return output

    return forward


def _covers(layer) -> bool:
    from bi_patch.ops.cuda import rotary

    plain = type(layer).__name__ in CLASSES
    return plain and rotary.covers(layer.head_size, layer.rotary_dim, layer.is_neox_style)


def _fused(model: str, qualname: str) -> Seam:
    return Seam(
        name=f"rotary.cuda_qk_norm_{model}",
        targets=(Target(f"vllm.model_executor.models.{model}", qualname),),
        close=_qk_norm,
        why="two separate norms and a rotation cost three launches in each layer",
        how="one launch computes both norms and the rotation, with the same bits as the three launches",
        until="upstream's fused code gives the bits of eager code at the same speed",
        required=False,
        causes=(2,),
    )


_SERVES = ("RotaryEmbedding", "RotaryEmbeddingBase")

SEAMS = (
    seam("cuda_forward", "RotaryEmbedding.forward_cuda", _rotary, serves=_SERVES, op="bi_patch.ops.cuda.rotary"),
    seam("cuda_native", "RotaryEmbedding.forward_native", _rotary),
    Seam(
        name="rotary.cuda_sections",
        targets=(
            Target("vllm.model_executor.layers.rotary_embedding.mrope", "MRotaryEmbedding.forward_native", ">=0.33"),
        ),
        close=_sections,
        why="compiled code rounds where a fused kernel ends, and eager code rounds after every operation",
        how="vLLM's kernel for rotations by sections (M-RoPE), one program for each row, serves compiled code, too",
        until="upstream's compiled and eager code give equal bits at the same speed",
        causes=(17,),
        relies=("_mrope_apply", "triton_mrope", "_triton_mrope_forward"),
    ),
    _fused("qwen3", "Qwen3Attention.forward"),
    _fused("qwen3_moe", "Qwen3MoeAttention.forward"),
)
