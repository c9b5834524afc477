"""MLA (multi-head latent attention) on Hopper, by FlashAttention 3.

MLA has two forms, whose bits differ: keys and values that are projected up, and the absorbed form. Upstream's mode
chooses the form by a request's number of new tokens in a step, so the chunk budget and the prefix cache decide.

BI_PATCH_MLA=two (default): the position decides. Prompts take the first form (mla_prompts.py) and generated tokens the
absorbed one (mla_rows.py), also when a preempted request is computed again. A cached block that holds generated tokens
serves only requests with a prompt of the same length.
BI_PATCH_MLA=one: every token takes the absorbed form, in one split, so that decode equals prefill.

FlashAttention-MLA reads no 8-bit latents. With an FP8 KV cache, in two forms, Triton-MLA's kernel computes generated
tokens (mla_eighths.py).
"""

import functools
import inspect

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cuda import mla_eighths, mla_prompts, mla_rows, mla_steps
from bi_patch.seams.cuda.attention import eighth
from bi_patch.seams.cuda.mla_prompts import LONG_QUERY as _LONG_QUERY
from bi_patch.seams.model import Policy, Seam, Target

_LAYER = "vllm.model_executor.layers.attention.mla_attention"
_FLASH = "vllm.v1.attention.backends.mla.flashattn_mla"
_TRITON = "vllm.v1.attention.backends.mla.triton_mla"
_BACKEND, _EIGHTHS = "FLASH_ATTN_MLA", "TRITON_MLA"
_RELEASES = ">=0.33"
_ALL = 1 << 30  # a number of new tokens that no request has
_RUNNER = "vllm.v1.worker.gpu.model_runner"
_RUNNER_V1 = "vllm.v1.worker.gpu_model_runner"
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"


def _forward(original):
    """MLAAttention.forward_impl: prompt rows take their form, generated rows the absorbed one."""

    @functools.wraps(original)
    def forward_impl(self, q, k_c_normed, k_pe, kv_cache, attn_metadata, output, *args, **kwargs):
        if attn_metadata is None or not mla_steps.two_forms():
            return original(self, q, k_c_normed, k_pe, kv_cache, attn_metadata, output, *args, **kwargs)
        asked = [name for name, value in kwargs.items() if value is not None and name != "quant_group_size"]
        if asked or any(value is not None for value in args):
            raise UnsupportedFeature("mla.cuda_forms: quantized outputs have no certificate. Set BI_PATCH_MLA=one")
        attend(self, q, k_c_normed, k_pe, kv_cache, attn_metadata, output)
        return output

    return forward_impl


def attend(layer, q, latents, rotary, cache, metadata, output) -> None:
    """Write the rows of a step in two forms to output [tokens, heads * D].

    q: [tokens, heads, nope + rotary], latents: [tokens, latent] and rotary: [tokens, 1, rotary]. cache: [pages, tokens,
    latent + rotary], which holds the step's latents, too. metadata: vLLM's, of the step.
    """
    generated, places, groups = getattr(metadata, "bi_patch_forms", None) or (metadata, None, ())
    generate = mla_rows.generate
    if eighth(layer.impl.kv_cache_dtype):
        generate, cache = mla_eighths.generate, cache.view(mla_eighths.e4m3())
    if places is not None:
        some = output.new_empty((len(places), output.shape[-1]))
        generate(layer, q[places], cache, generated, some)
        output[places] = some
    elif generated is not None:
        count = generated.num_actual_tokens
        generate(layer, q[:count], cache, generated, output[:count])
    for group in groups:
        mla_prompts.attend(layer.impl, q, latents, rotary, cache, group, output)


def _init(original):
    """MLAAttention.__init__: take the backend that has a certificate, and refuse every other backend and option."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        held = signature.bind(self, *args, **kwargs)
        cache = held.arguments.get("cache_config")
        if eighth(getattr(cache, "cache_dtype", None)) and held.arguments.get("attn_backend") is None and not _chosen():
            held.arguments["attn_backend"] = _triton()
        cached = getattr(cache, "enable_prefix_caching", None)
        original(*held.args, **held.kwargs)
        if cached is not None:
            cache.enable_prefix_caching = cached  # upstream's mode turns it off beside Triton-MLA
        _refuse(self)

    return __init__


def _refuse(layer) -> None:
    kind, name = layer.kv_cache_dtype, layer.attn_backend.get_name()
    wanted = _EIGHTHS if eighth(kind) and mla_steps.two_forms() else _BACKEND
    attention = getattr(getattr(layer, "_vllm_config", None), "attention_config", None)
    refused = {
        f"the {name} backend{f' of a {kind} KV cache' if wanted == _EIGHTHS else ''}": name != wanted,
        "sparse attention": layer.use_sparse or layer.indexer is not None,
        "a sliding window": layer.sliding_window is not None,
        "attention to later tokens": layer.non_causal_multi_token_decode,
        f"a {kind} KV cache": kind not in ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3"),
        f"a {kind} KV cache in one form": eighth(kind) and not mla_steps.two_forms(),
        "8-bit queries of prompts": getattr(attention, "use_prefill_query_quantization", False),
        "context parallelism": layer.use_pcp or layer.impl.dcp_world_size > 1 or layer.dcp_q_replicate,
    }
    found = [name for name, present in refused.items() if present] + without_kernel(layer)
    if found:
        raise UnsupportedFeature(
            f"mla.cuda: bi_patch has no certificate for {', '.join(found)}. Use --attention-backend {wanted} on "
            "Hopper and the default options, or set BI_PATCH=0"
        )


def without_kernel(layer) -> list[str]:
    """Words for sizes that FlashAttention 3 has no kernel for: of latents, and of the heads of prompts."""
    latent, rotary, value = layer.kv_lora_rank, layer.qk_rope_head_dim, layer.v_head_dim
    size = layer.qk_nope_head_dim + rotary
    words = []
    if (latent, rotary) != (512, 64):
        words.append(f"latents of {latent} + {rotary} elements")
    if mla_steps.two_forms() and not (size == value <= 256 or 128 < size <= 192 and 96 < value <= 128):
        words.append(f"heads of {size} elements with values of {value}")
    return words


def _chosen() -> bool:
    """Whether the user named an attention backend."""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config().attention_config.backend is not None


def _triton():
    from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend

    return TritonMLABackend


def _rows(original):
    """FlashAttnMLAMetadataBuilder.__init__: one form: requests of any length take the absorbed form. Two forms: only
    single tokens do, and each of them is a sequence of its own."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if not mla_steps.two_forms():
            self.reorder_batch_threshold = _ALL
            return
        self.reorder_batch_threshold = 1
        config = self.vllm_config
        self.bi_patch_rows = mla_rows.Rows(
            self.num_heads,
            self.mla_dims.kv_lora_rank,
            self.mla_dims.qk_rope_head_dim,
            self.page_size,
            self.kv_cache_spec.dtype,
            self.device,
            config.model_config.max_model_len,
            max(config.scheduler_config.max_num_seqs, self.max_cudagraph_size or 0),
        )
        self.bi_patch_rows.check()

    return __init__


def _eighths(original):
    """TritonMLAMetadataBuilder.__init__: single generated tokens take the absorbed form, as in `_rows`."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if mla_steps.two_forms():
            self.reorder_batch_threshold = 1
            self.bi_patch_rows = mla_eighths.Rows()

    return __init__


def _query(original):
    """FlashAttnMLAMetadataBuilder._build_decode: one form: report a long query, so that every step takes the same tile.
    Two forms: split keys by each row's own position."""

    @functools.wraps(original)
    def _build_decode(self, *args, **kwargs):
        if hasattr(self, "bi_patch_rows"):
            return self.bi_patch_rows.make(
                kwargs["block_table_tensor"], kwargs["seq_lens_device"], kwargs["max_seq_len"]
            )
        made = original(self, *args, **kwargs)
        made.max_query_len = max(made.max_query_len, _LONG_QUERY)
        return made

    return _build_decode


def _schedule(original):
    """FlashAttnMLAMetadataBuilder._schedule_decode: schedule for the reported query, in one split."""

    @functools.wraps(original)
    def _schedule_decode(self, *, max_query_len, max_num_splits, **given):
        return original(self, max_query_len=max(max_query_len, _LONG_QUERY), max_num_splits=1, **given)

    return _schedule_decode


def _projection(original):
    """DeepSeekV2FusedQkvAProjLinear.__init__: turn off the kernel for few tokens, so that the layer takes a linear's
    certified route."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self._use_min_latency_gemm = False

    return __init__


def _seam(name: str, qualname: str, close, why: str, how: str, causes, module: str = _FLASH, **given) -> Seam:
    return Seam(
        name=f"mla.cuda_{name}",
        targets=(Target(module, qualname, _RELEASES),),
        releases=_RELEASES,
        close=close,
        why=why,
        how=how,
        causes=causes,
        **given,
    )


_FORM = (
    "the other form of MLA has other bits, and vLLM chooses the form by a request's number of new tokens in a step. So "
    "the chunk budget, the prefix cache and a preemption decide the bits"
)
_BY_POSITION = "upstream chooses the form by position (https://github.com/vllm-project/vllm/issues/27433)"

POLICIES = (
    Policy(
        name="mla.cuda_forms",
        apply=mla_steps.only_one_form,
        releases=_RELEASES,
        why="a token's form depends on its position, which not every part of vLLM knows",
    ),
)

SEAMS = (
    _seam(
        "step",
        "GPUModelRunner.gather_batch_req_state",
        mla_steps.step,
        _FORM,
        "bi_patch notes each request's prompt length, and a step with prompt rows runs no graph of decode steps",
        (6, 7, 9),
        _RUNNER,
        until=_BY_POSITION,
    ),
    _seam(
        "keys",
        "_gen_prompt_embeds_extra_hash_keys",
        mla_steps.keys,
        "a cached block with generated tokens holds latents that a prompt with the same tokens would not have",
        "the hash of such a block also holds the prompt's length",
        (7,),
        "vllm.v1.core.kv_cache_utils",
        until=_BY_POSITION,
    ),
    _seam(
        "step_v1",
        "GPUModelRunner._determine_batch_execution_and_padding",
        mla_steps.step_v1,
        _FORM,
        "the same in model runner V1",
        (6, 7, 9),
        _RUNNER_V1,
        until=_BY_POSITION,
    ),
    _seam(
        "capture",
        "CudaGraphManager.capture",
        mla_steps.capture,
        _FORM,
        "a captured step knows no prompt lengths of an earlier step",
        (6,),
        _GRAPHS,
        until=_BY_POSITION,
    ),
    _seam(
        "build",
        "MLACommonMetadataBuilder.build",
        mla_steps.build,
        _FORM,
        "prompt rows and generated rows of a step are described apart, by position",
        (6, 7, 9),
        _LAYER,
        until=_BY_POSITION,
    ),
    _seam(
        "forward",
        "MLAAttention.forward_impl",
        _forward,
        _FORM + ". vLLM merges a chunk with its context where the scheduler cut",
        "prompt rows attend to all keys from position 0 in one chain, generated rows take the absorbed form",
        (6, 7, 9),
        _LAYER,
        until=_BY_POSITION,
    ),
    _seam(
        "backend",
        "MLAAttention.__init__",
        _init,
        "a backend whose form, split or tile depends on the batch gives bits that depend on the batch",
        "bi_patch takes FlashAttention-MLA, and Triton-MLA for an FP8 KV cache. It refuses other backends, and options "
        "without a certificate",
        (3, 4),
        _LAYER,
        until="never: bi_patch itself decides here which backends it accepts",
        serves=("MLAAttention", "MultiHeadLatentAttentionWrapper"),
    ),
    _seam(
        "rows",
        "FlashAttnMLAMetadataBuilder.__init__",
        _rows,
        "requests of more than 512 new tokens take the form with up-projected keys and values, whose bits differ. So "
        "the chunk budget, the prefix cache and a preemption decide the bits",
        "two forms: single generated tokens take the absorbed form; one form: every token does",
        (6, 7, 9),
        until="upstream chooses the form by position (https://github.com/vllm-project/vllm/issues/27433)",
    ),
    _seam(
        "eighths",
        "TritonMLAMetadataBuilder.__init__",
        _eighths,
        "several new tokens of a request take another form than single ones, whose bits differ, and the longest "
        "request decides how keys are split",
        "of an FP8 KV cache, single generated tokens take the absorbed form, in a fixed number of parts",
        (3, 6, 7, 9),
        _TRITON,
        until=_BY_POSITION,
        relies=tuple(f"vllm.v1.attention.ops.triton_decode_attention:{name}" for name in mla_eighths.KERNELS),
    ),
    _seam(
        "query",
        "FlashAttnMLAMetadataBuilder._build_decode",
        _query,
        "FlashAttention 3 chooses a tile by the longest query of the batch",
        "two forms: each row is a sequence of its own, whose position decides the split; one form: bi_patch reports a "
        "longest query of at least 128 tokens",
        (4, 25),
        until="FlashAttention 3 uses one KV tile per head size (https://github.com/vllm-project/vllm/issues/51902)",
    ),
    _seam(
        "schedule",
        "FlashAttnMLAMetadataBuilder._schedule_decode",
        _schedule,
        "the schedule of a step splits KV by the batch",
        "one form: the schedule is made for one split and for the reported query",
        (3,),
        until="upstream's batch-invariant mode schedules as bi_patch does",
    ),
    _seam(
        "projection",
        "DeepSeekV2FusedQkvAProjLinear.__init__",
        _projection,
        "a special kernel serves up to 16 tokens of DeepSeek-V3's low-rank projection",
        "bi_patch turns this kernel off, so the projection is a linear layer with a certified route",
        (1,),
        "vllm.model_executor.models.deepseek_v2",
        until="upstream's mode turns the kernel off",
    ),
)
