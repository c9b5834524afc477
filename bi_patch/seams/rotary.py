"""Seams of rotary embedding: the same bits compiled and eager, whatever runs beside a token."""

from bi_patch.seams.model import CPU, CPU_RELEASES, CUDA, Seam, Target

_BASE = "vllm.model_executor.layers.rotary_embedding.base"
# Those whose forward is RotaryEmbedding's own.
_CLASSES = frozenset(
    {
        "RotaryEmbedding",
        "Llama3RotaryEmbedding",
        "LinearScalingRotaryEmbedding",
        "DynamicNTKScalingRotaryEmbedding",
        "YaRNScalingRotaryEmbedding",
    }
)


def _cpu_rotary(original):
    """RotaryEmbedding.forward_cpu and forward_native: one bundled kernel, compiled or not."""
    from bi_patch.orders import cpu

    def forward(self, positions, query, key=None):
        if positions.ndim != 1 or type(self).__name__ not in _CLASSES:
            return original(self, positions, query, key)
        cache = self._match_cos_sin_cache_dtype(query)

        def turn(x):
            return cpu.rope(positions, x, cache, self.head_size, self.is_neox_style)

        return turn(query), None if key is None else turn(key)

    return forward


def _cuda_rotary(original):
    """RotaryEmbedding.forward_cuda and forward_native: one bundled kernel, compiled or not."""
    from bi_patch.orders import cuda_rope

    cuda_rope.define_op()

    def forward(self, positions, query, key=None):
        if key is None or positions.ndim != 1 or not _cuda_covers(self):
            return original(self, positions, query, key)
        cache = self._match_cos_sin_cache_dtype(query)
        return cuda_rope.rope(positions, query, key, cache, self.head_size)

    return forward


def _cuda_qk_norm(original):
    """Qwen3's attention: the norms of query and key heads and the rotation in one launch, as fast as stock's fusion."""
    from bi_patch.orders import cuda_rope

    cuda_rope.define_op()

    def forward(self, positions, hidden_states):
        if positions.ndim != 1 or not _cuda_covers(self.rotary_emb):
            return original(self, positions, hidden_states)
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        cache = self.rotary_emb._match_cos_sin_cache_dtype(q)
        q, k = cuda_rope.rope(
            positions, q, k, cache, self.head_dim,
            self.q_norm.weight.data, self.k_norm.weight.data, self.q_norm.variance_epsilon,
        )  # fmt: skip
        output, _ = self.o_proj(self.attn(q, k, v))
        return output

    return forward


def _cuda_covers(rotary) -> bool:
    from bi_patch.orders import cuda_rope

    plain = type(rotary).__name__ in _CLASSES
    return plain and cuda_rope.covers(rotary.head_size, rotary.rotary_dim, rotary.is_neox_style)


def _forward(platforms, name: str, qualname: str, close, releases: str = ">=0.23,<0.34") -> Seam:
    return Seam(
        name=f"rotary.{name}",
        targets=(Target(_BASE, qualname, releases),),
        close=close,
        why="compiled code rounds where its fusions end, eager code after every step",
        how="one bundled kernel rounds once, compiled or not",
        until="upstream's compiled and eager code give equal bits at the same speed",
        platforms=platforms,
        causes=(17,),
    )


def _fused(model: str, qualname: str) -> Seam:
    return Seam(
        name=f"rotary.cuda_qk_norm_{model}",
        targets=(Target(f"vllm.model_executor.models.{model}", qualname),),
        close=_cuda_qk_norm,
        why="two norms and a rotation apart cost three launches a layer",
        how="one launch, in the same order",
        until="upstream's compiled and eager code give equal bits at the same speed",
        platforms=CUDA,
        required=False,
        causes=(2,),
    )


SEAMS = (
    _forward(CPU, "cpu_forward", "RotaryEmbedding.forward_cpu", _cpu_rotary, CPU_RELEASES),
    _forward(CPU, "cpu_native", "RotaryEmbedding.forward_native", _cpu_rotary, CPU_RELEASES),
    _forward(CUDA, "cuda_forward", "RotaryEmbedding.forward_cuda", _cuda_rotary),
    _forward(CUDA, "cuda_native", "RotaryEmbedding.forward_native", _cuda_rotary),
    _fused("qwen3", "Qwen3Attention.forward"),
    _fused("qwen3_moe", "Qwen3MoeAttention.forward"),
)
