"""Seams of attention. On CPU the bundled kernel replaces the stock one: KV leaves by position, not by batch."""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import CPU, CPU_RELEASES, CUDA, Policy, Seam, Target

_CPU_MODULE = "vllm.v1.attention.backends.cpu_attn"


def _cpu_init(original):
    """CPUAttentionBackendImpl.__init__: refuse what the bundled kernel does not compute."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        refused = {
            "ALiBi slopes": self.alibi_slopes is not None,
            "attention sinks": self.sinks is not None,
            f"a {self.kv_cache_dtype} KV cache": self.is_fp8_kv_cache,
            f"{self.attn_type} attention": self.attn_type != "decoder",
        }
        found = [name for name, present in refused.items() if present]
        if found:
            raise UnsupportedFeature(
                f"attention.cpu: the invariant CPU attention does not cover {', '.join(found)}. Set BI_PATCH=0"
            )

    return __init__


def _cpu_build(original):
    """CPUAttentionMetadataBuilder.build: no work split is planned from the batch."""

    @functools.wraps(original)
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

        common = common_attn_metadata
        if common.causal is not True:
            raise UnsupportedFeature("attention.cpu: only causal decoder attention is covered on CPU. Set BI_PATCH=0")
        return CPUAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            causal=True,
        )

    return build


def _cpu_forward(original):
    """CPUAttentionBackendImpl.forward: the bundled kernel, one order for every split of the work."""
    from bi_patch.orders import cpu

    @functools.wraps(original)
    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale=None, output_block_scale=None):
        if attn_metadata is None:  # warm-up
            return output
        tokens = attn_metadata.num_actual_tokens
        cpu.attention(
            output[:tokens],
            query[:tokens],
            kv_cache,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            self.scale,
            self.sliding_window - 1 if self.sliding_window > 0 else -1,  # vLLM's window counts the token itself
            self.logits_soft_cap,
        )
        return output

    return forward


def _cpu_store(original):
    """CPUAttentionBackendImpl.do_kv_cache_update: the cache in the bundled kernel's layout."""
    from bi_patch.orders import cpu

    @functools.wraps(original)
    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        cpu.kv_store(key, value, kv_cache, slot_mapping)

    return do_kv_cache_update


def _cuda_backend(original):
    """Attention.__init__: a backend, head size or window that was not shown to be invariant is refused by name."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        name = self.attn_backend.get_name()
        if name not in _CUDA_BACKENDS:
            raise UnsupportedFeature(
                f"attention.cuda_backend: the {name} backend is not covered. "
                f"Use --attention-backend {' or '.join(_CUDA_BACKENDS)}, or set BI_PATCH=0"
            )
        found = f"heads of {self.head_size} elements" if self.head_size not in _CUDA_HEAD_SIZES else ""
        if self.sliding_window is not None:
            found = f"a sliding window of {self.sliding_window} tokens"
        if found:
            raise UnsupportedFeature(
                f"attention.cuda_backend: with {found}, a token that {name} decodes differs from the same token "
                "prefilled. Use a model with heads of 128 elements and full attention, or set BI_PATCH=0"
            )

    return __init__


def _cuda_rotary(original):
    """RotaryEmbedding.forward_cuda and forward_native: one bundled kernel, compiled or not."""
    from bi_patch.orders import cuda_rope

    cuda_rope.define_op()

    def forward(self, positions, query, key=None):
        if key is None or positions.ndim != 1 or not _covers(self):
            return original(self, positions, query, key)
        cache = self._match_cos_sin_cache_dtype(query)
        return cuda_rope.rope(positions, query, key, cache, self.head_size)

    return forward


def _cuda_qk_norm(original):
    """Qwen3's attention: the norms of query and key heads and the rotation in one launch, as fast as stock's fusion."""
    from bi_patch.orders import cuda_rope

    cuda_rope.define_op()

    def forward(self, positions, hidden_states):
        if positions.ndim != 1 or not _covers(self.rotary_emb):
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


def _covers(rotary) -> bool:
    from bi_patch.orders import cuda_rope

    plain = type(rotary).__name__ in _ROTARY_CLASSES
    return plain and cuda_rope.covers(rotary.head_size, rotary.rotary_dim, rotary.is_neox_style)


def _has_window(builder) -> bool:
    """Whether any layer of the builder's model attends to a window only."""
    held = builder.__dict__.get("_bi_patch_window")
    if held is None:
        from vllm.v1.attention.backends import flash_attn

        held = not flash_attn._get_sliding_window_configs(builder.vllm_config) <= {None, (-1, -1)}
        builder._bi_patch_window = held
    return held


def _cuda_schedule(original):
    """FlashAttentionMetadataBuilder._get_scheduler_metadata: tiles are ordered once a step, for one split."""

    @functools.wraps(original)
    def _get_scheduler_metadata(self, *, aot_schedule, max_num_splits, **arguments):
        wanted = self.aot_schedule and not _has_window(self) and arguments["causal"] is True
        return original(self, aot_schedule=aot_schedule or wanted, max_num_splits=max_num_splits, **arguments)

    return _get_scheduler_metadata


def _refuse_cuda(config) -> None:
    if config.model_config is not None and config.model_config.use_mla:
        raise UnsupportedFeature(
            "attention.cuda_mla: MLA was not shown to be invariant on CUDA. Use a model without MLA, or set BI_PATCH=0"
        )


def _refuse_cpu(config) -> None:
    if config.model_config is not None and config.model_config.use_mla:
        raise UnsupportedFeature(
            "attention.cpu: MLA has no invariant kernel on CPU. Use a model without MLA, or set BI_PATCH=0"
        )


def _cpu_seam(name: str, qualname: str, close, how: str) -> Seam:
    return Seam(
        name=f"attention.cpu_{name}",
        targets=(Target(_CPU_MODULE, qualname, CPU_RELEASES),),
        close=close,
        why="the stock kernel splits KV by the batch's total length over threads, and tiles KV by the query tile",
        how=how,
        until="upstream's CPU attention splits KV by position",
        platforms=CPU,
        causes=(3, 4, 6, 7, 9),
    )


# What was shown to give equal bits in decode and prefill, whatever the batch.
_CUDA_BACKENDS = ("FLASH_ATTN",)
_CUDA_HEAD_SIZES = (128,)
# Those whose forward is RotaryEmbedding's own.
_ROTARY_CLASSES = frozenset(
    {
        "RotaryEmbedding",
        "Llama3RotaryEmbedding",
        "LinearScalingRotaryEmbedding",
        "DynamicNTKScalingRotaryEmbedding",
        "YaRNScalingRotaryEmbedding",
    }
)
_ROTARY = "vllm.model_executor.layers.rotary_embedding.base"


def _cuda_seam(
    name: str, module: str, qualname: str, close, why: str, how: str, causes, releases=">=0.23,<0.34"
) -> Seam:
    return Seam(
        name=f"attention.cuda_{name}",
        targets=(Target(module, qualname, releases),),
        close=close,
        why=why,
        how=how,
        until="upstream's compiled and eager code give equal bits at the same speed",
        platforms=CUDA,
        required=name.startswith("rotary"),
        causes=causes,
    )


SEAMS = (
    Seam(
        name="attention.cuda_backend",
        targets=(Target("vllm.model_executor.layers.attention.attention", "Attention.__init__"),),
        close=_cuda_backend,
        why="a backend that splits or tiles KV by the batch changes bits with the batch",
        how="FlashAttention 3 runs one split in upstream's mode; other backends, head sizes and windows are refused",
        until="never: it is the gate",
        platforms=CUDA,
        causes=(3, 4, 25),
    ),
    _cuda_seam(
        "rotary", _ROTARY, "RotaryEmbedding.forward_cuda", _cuda_rotary,
        "eager code rounds where compiled code does not", "one bundled kernel rounds once, compiled or not", (17,)
    ),
    _cuda_seam(
        "rotary_native", _ROTARY, "RotaryEmbedding.forward_native", _cuda_rotary,
        "compiled code rounds where its fusions end", "one bundled kernel rounds once, compiled or not", (17,)
    ),
    _cuda_seam(
        "qk_norm_qwen3", "vllm.model_executor.models.qwen3", "Qwen3Attention.forward", _cuda_qk_norm,
        "two norms and a rotation apart cost three launches a layer", "one launch, in the same order", (2,)
    ),
    _cuda_seam(
        "qk_norm_qwen3_moe", "vllm.model_executor.models.qwen3_moe", "Qwen3MoeAttention.forward", _cuda_qk_norm,
        "two norms and a rotation apart cost three launches a layer", "one launch, in the same order", (2,)
    ),
    _cuda_seam(
        "schedule", "vllm.v1.attention.backends.flash_attn", "FlashAttentionMetadataBuilder._get_scheduler_metadata",
        _cuda_schedule, "upstream's mode orders FlashAttention's tiles anew in every layer",
        "ordered once a step for one split: the order of tiles reaches no sum", (3,), ">=0.32,<0.34"
    ),
    _cpu_seam("init", "CPUAttentionBackendImpl.__init__", _cpu_init, "refuses by name what the kernel does not cover"),
    _cpu_seam("build", "CPUAttentionMetadataBuilder.build", _cpu_build, "plans nothing from the batch"),
    _cpu_seam("forward", "CPUAttentionBackendImpl.forward", _cpu_forward,
              "the bundled kernel: KV leaves of fixed length at fixed positions, merged in ascending order"),
    _cpu_seam("store", "CPUAttentionBackendImpl.do_kv_cache_update", _cpu_store, "the bundled kernel's cache layout"),
)

POLICIES = (
    Policy(
        name="attention.cuda_mla",
        apply=_refuse_cuda,
        why="MLA was not shown to be invariant on CUDA",
        platforms=CUDA,
    ),
    Policy(name="attention.cpu_mla", apply=_refuse_cpu, why="MLA has no invariant kernel on CPU", platforms=CPU),
)
