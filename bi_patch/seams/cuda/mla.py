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
from bi_patch.seams import active
from bi_patch.seams.cuda import mla_eighths, mla_prompts, mla_rows
from bi_patch.seams.cuda.attention import eighth
from bi_patch.seams.cuda.chunks import Metadata
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

# The prompt length of each request of the current step, in the order of the step. None for a dummy step.
_prompts = None


def two_forms() -> bool:
    return active.mla == "two"


def _only_one_form(config) -> None:
    """Refuse what has only one form."""
    if two_forms() and getattr(config.model_config, "use_mla", False):
        if getattr(config.parallel_config, "use_ubatching", False):
            raise UnsupportedFeature(
                "mla.cuda_forms: nobody has compared MLA in two forms with micro-batches. Set BI_PATCH_MLA=one"
            )


def _step(original):
    """GPUModelRunner.gather_batch_req_state: say which requests of the step still compute their prompt. A step with
    prompt rows runs no graph of decode steps."""

    @functools.wraps(original)
    def gather_batch_req_state(self, scheduler_output, dummy_run):
        global _prompts
        state, uniform = original(self, scheduler_output, dummy_run)
        if not two_forms():
            return state, uniform
        if state is None:
            _prompts = None
            return state, uniform
        _prompts = self.req_states.prompt_len.np[state.idx_mapping_np]
        if (state.num_computed_prefill_tokens_np < _prompts).any():
            return state._replace(decode_graph_eligible=False), None
        return state, uniform

    return gather_batch_req_state


def _keys(original):
    """_gen_prompt_embeds_extra_hash_keys: the hash of a block with generated tokens also holds the prompt's length."""

    @functools.wraps(original)
    def _gen_prompt_embeds_extra_hash_keys(request, start_token_idx, end_token_idx):
        found = original(request, start_token_idx, end_token_idx)
        if active.latent and two_forms() and end_token_idx > request.num_prompt_tokens:
            return [*found, ("bi_patch_prompt", request.num_prompt_tokens)]
        return found

    return _gen_prompt_embeds_extra_hash_keys


def _step_v1(original):
    """GPUModelRunner._determine_batch_execution_and_padding of model runner V1: as `_step`. vLLM forces the kind of a
    dummy step, and of no other."""

    @functools.wraps(original)
    def _determine_batch_execution_and_padding(self, num_tokens, num_reqs, *args, force_uniform_decode=None, **kwargs):
        global _prompts
        if two_forms():
            _prompts = None
            if force_uniform_decode is None:
                _prompts = self.input_batch.num_prompt_tokens[:num_reqs].copy()
                if (self.input_batch.num_computed_tokens_cpu[:num_reqs] < _prompts).any():
                    force_uniform_decode = False
        return original(self, num_tokens, num_reqs, *args, force_uniform_decode=force_uniform_decode, **kwargs)

    return _determine_batch_execution_and_padding


def _capture(original):
    """CudaGraphManager.capture: the steps that vLLM captures are dummy steps. The warm-up before them is none."""

    @functools.wraps(original)
    def capture(self, *args, **kwargs):
        global _prompts
        _prompts = None
        return original(self, *args, **kwargs)

    return capture


def _build(original):
    """MLACommonMetadataBuilder.build: the position of a token decides its form."""

    @functools.wraps(original)
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        if not hasattr(self, "bi_patch_rows"):  # one form, or another backend
            return original(self, common_prefix_len, common_attn_metadata, fast_build)
        if common_attn_metadata.causal is False:
            raise UnsupportedFeature("mla.cuda_forms: only causal MLA has a certificate")
        rows, segments = _divide(common_attn_metadata, _prompts)
        if not segments and len(rows) == 0:
            return original(self, common_prefix_len, common_attn_metadata, fast_build)
        return _mixed(self, common_attn_metadata, rows, segments)

    return build


def _divide(common, prompts):
    """The generated rows of a step, as (row, request, keys) each, and the prompt segments.

    prompts: the prompt length of each request, or None for a dummy step, where several tokens of a request are a
    prompt. Both lists are empty if every request has one generated row: such a step needs no lists.
    """
    import numpy as np

    starts = common.query_start_loc_cpu.numpy()
    counts = np.diff(starts)
    ends = common.seq_lens_cpu_upper_bound.numpy()[: len(counts)]
    if prompts is None:
        own = np.where(counts > 1, counts, 0)
    else:
        if int((counts[len(prompts) :]).sum()) or len(prompts) > len(counts):
            raise UnsupportedFeature(
                f"mla.cuda_forms: a step of {len(counts)} requests, of which {len(prompts)} are known. "
                "Set BI_PATCH_MLA=one"
            )
        own = np.zeros_like(counts)
        own[: len(prompts)] = np.clip(prompts - (ends - counts)[: len(prompts)], 0, counts[: len(prompts)])
    if not own.any() and counts.max() <= 1:
        return [], []
    rows, segments = [], []
    for request, (first, count, mine, end) in enumerate(
        zip(starts[:-1].tolist(), counts.tolist(), own.tolist(), ends.tolist(), strict=True)
    ):
        before = end - count
        if mine:
            segments.append(mla_prompts.Segment(first, mine, before + mine, request))
        rows += [(first + row, request, before + row + 1) for row in range(mine, count)]
    return rows, segments


def _mixed(builder, common, rows, segments):
    """The metadata of a step with prompt rows, or with several generated rows of a request."""
    import torch
    from vllm.utils.torch_utils import async_tensor_h2d

    device, table = builder.device, common.block_table_tensor
    made = builder.metadata_cls(
        num_reqs=common.num_reqs,
        max_query_len=common.max_query_len,
        max_seq_len=common.max_seq_len,
        num_actual_tokens=common.num_actual_tokens,
        query_start_loc=common.query_start_loc,
        slot_mapping=common.slot_mapping,
        head_dim=builder.model_config.get_head_size(),
        num_decodes=0,
        num_decode_tokens=0,
        num_prefills=common.num_reqs,
        causal=True,
        prefill=None,
        decode=None,
    )
    generated, places = None, None
    if rows:
        count = len(rows)
        if all(row[0] == row[1] == number for number, row in enumerate(rows)):  # one row each, before all others
            blocks, lengths = table[:count], common.seq_lens[:count]
        else:
            numbers = async_tensor_h2d([list(column) for column in zip(*rows, strict=True)], device, torch.int32)
            places = numbers[0].long()
            blocks, lengths = table[numbers[1].long()], numbers[2].contiguous()
        generated = Metadata(
            num_actual_tokens=count,
            num_decodes=count,
            num_decode_tokens=count,
            num_prefills=0,
            query_start_loc=None,
            decode=builder.bi_patch_rows.make(blocks, lengths, common.max_seq_len),
        )
    workspace = builder.chunked_prefill_workspace
    made.bi_patch_forms = (
        generated,
        places,
        [mla_prompts.Group(some, table, workspace, device) for some in mla_prompts.groups(segments, len(workspace))],
    )
    return made


def _forward(original):
    """MLAAttention.forward_impl: prompt rows take their form, generated rows the absorbed one."""

    @functools.wraps(original)
    def forward_impl(self, q, k_c_normed, k_pe, kv_cache, attn_metadata, output, *args, **kwargs):
        if attn_metadata is None or not two_forms():
            return original(self, q, k_c_normed, k_pe, kv_cache, attn_metadata, output, *args, **kwargs)
        asked = [name for name, value in kwargs.items() if value is not None and name != "quant_group_size"]
        if asked or any(value is not None for value in args):
            raise UnsupportedFeature("mla.cuda_forms: quantized outputs have no certificate. Set BI_PATCH_MLA=one")
        generated, places, groups = getattr(attn_metadata, "bi_patch_forms", None) or (attn_metadata, None, ())
        generate = mla_rows.generate
        if eighth(self.impl.kv_cache_dtype):
            generate, kv_cache = mla_eighths.generate, kv_cache.view(_e4m3())
        if places is not None:
            some = output.new_empty((len(places), output.shape[-1]))
            generate(self, q[places], kv_cache, generated, some)
            output[places] = some
        elif generated is not None:
            count = generated.num_actual_tokens
            generate(self, q[:count], kv_cache, generated, output[:count])
        for group in groups:
            mla_prompts.attend(self.impl, q, k_c_normed, k_pe, kv_cache, group, output)
        return output

    return forward_impl


def _e4m3():
    import torch

    return torch.float8_e4m3fn


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
    wanted = _EIGHTHS if eighth(kind) and two_forms() else _BACKEND
    attention = getattr(getattr(layer, "_vllm_config", None), "attention_config", None)
    refused = {
        f"the {name} backend{f' of a {kind} KV cache' if wanted == _EIGHTHS else ''}": name != wanted,
        "sparse attention": layer.use_sparse or layer.indexer is not None,
        "a sliding window": layer.sliding_window is not None,
        "attention to later tokens": layer.non_causal_multi_token_decode,
        f"a {kind} KV cache": kind not in ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3"),
        f"a {kind} KV cache in one form": eighth(kind) and not two_forms(),
        "8-bit queries of prompts": getattr(attention, "use_prefill_query_quantization", False),
        "context parallelism": layer.use_pcp or layer.impl.dcp_world_size > 1 or layer.dcp_q_replicate,
    }
    found = [name for name, present in refused.items() if present] + _without_kernel(layer)
    if found:
        raise UnsupportedFeature(
            f"mla.cuda: bi_patch has no certificate for {', '.join(found)}. Use --attention-backend {wanted} on "
            "Hopper and the default options, or set BI_PATCH=0"
        )


def _without_kernel(layer) -> list[str]:
    """Words for sizes that FlashAttention 3 has no kernel for: of latents, and of the heads of prompts."""
    latent, rotary, value = layer.kv_lora_rank, layer.qk_rope_head_dim, layer.v_head_dim
    size = layer.qk_nope_head_dim + rotary
    words = []
    if (latent, rotary) != (512, 64):
        words.append(f"latents of {latent} + {rotary} elements")
    if two_forms() and not (size == value <= 256 or 128 < size <= 192 and 96 < value <= 128):
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
        if not two_forms():
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
        if two_forms():
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


def _paged(layer, page: int, latents):
    """Latents [tokens, D] in a cache whose pages are in disorder: the cache, and the order of its pages."""
    import torch

    tokens, device = len(latents), latents.device
    count = -(-tokens // page)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count)).to(device)
    at = torch.arange(tokens, device=device)
    cache = torch.zeros((count * page, latents.shape[-1]), dtype=latents.dtype, device=device)
    cache[order[at // page] * page + at % page] = latents
    return cache.view(count, page, -1), order.to(torch.int32)


def _stored(layer, page: int, latents):
    """As `_paged`, in the type of the layer's cache."""
    if not eighth(layer.kv_cache_dtype):
        return _paged(layer, page, latents)
    import torch

    cache, order = _paged(layer, page, latents.to(_e4m3()).view(torch.uint8))
    return cache.view(_e4m3()), order


def prepare_rows(layer, page: int, q, k, v):
    """As `prepare`, for generated tokens in two forms: each row is a sequence of its own, and the products with the
    up-projection belong to it. q: [tokens, heads, nope + rotary]. The rows are [tokens, heads, D]."""
    import torch

    tokens, device = len(q), q.device
    cache, order = _stored(layer, page, _latents(layer, tokens, q))
    if eighth(layer.kv_cache_dtype):
        rows, generate = mla_eighths.Rows(), mla_eighths.generate
    else:
        rows = mla_rows.Rows(q.shape[1], layer.kv_lora_rank, layer.qk_rope_head_dim, page, q.dtype, device, tokens)
        rows.check()
        generate = mla_rows.generate

    def run(sequences):
        at = [row for first, new in sequences for row in range(first, first + new)]
        lengths = torch.tensor([row + 1 for row in at], dtype=torch.int32, device=device)
        step = Metadata(decode=rows.make(order.expand(len(at), -1).contiguous(), lengths, max(at) + 1))
        out = q.new_empty((len(at), q.shape[1] * layer.v_head_dim))
        generate(layer, q[at], cache, step, out)
        return out.view(len(at), q.shape[1], layer.v_head_dim)

    return run


def _latents(layer, tokens: int, like):
    """Random latents [tokens, D]."""
    import torch

    generator = torch.Generator(like.device).manual_seed(tokens)
    return torch.randn((tokens, layer.head_size), generator=generator, device=like.device).to(like.dtype)


def prepare_prompt(layer, page: int, q, k, v):
    """As `prepare_rows`, for prompts in two forms."""
    import torch

    tokens, device, impl = len(q), q.device, layer.impl
    latents = _latents(layer, tokens, q)
    cache, order = _stored(layer, page, latents)
    workspace = torch.empty((3 * tokens, layer.head_size), dtype=q.dtype, device=device)

    def run(sequences):
        table = order.expand(len(sequences), -1).contiguous()
        segments, at, first = [], [], 0
        for request, (begin, new) in enumerate(sequences):
            segments.append(mla_prompts.Segment(first, new, begin + new, request))
            at += range(begin, begin + new)
            first += new
        out = q.new_empty((len(at), impl.num_heads * impl.v_head_dim))
        low, turned = latents[at, : layer.kv_lora_rank], latents[at, layer.kv_lora_rank :].unsqueeze(1)
        for some in mla_prompts.groups(segments, len(workspace)):
            group = mla_prompts.Group(some, table, workspace, device)
            mla_prompts.attend(impl, q[at], low, turned, cache, group, out)
        return out.view(len(at), impl.num_heads, impl.v_head_dim)

    return run


def prepare(layer, page: int, q, k, v):
    """Write latents k [tokens, 1, D] into a cache, and return how to compute rows of the prompt q [tokens, heads, D].

    As chunks.Prepare; the rows are [tokens, heads, latent]. v is not used: a latent holds the value.
    """
    import torch
    from vllm.v1.attention.backends import fa_utils

    tokens, device, heads = len(q), q.device, q.shape[1]
    at = torch.arange(tokens, device=device)
    cache, order = _paged(layer, page, k[:, 0])
    latent = layer.kv_lora_rank

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    def run(sequences):
        longest = max(_LONG_QUERY, *(new for _, new in sequences))
        starts = [0]
        for _, new in sequences:
            starts.append(starts[-1] + new)
        lengths = [first + new for first, new in sequences]
        rows = torch.cat([at[first : first + new] for first, new in sequences])
        decode = Metadata(
            block_table=order.expand(len(sequences), -1).contiguous(),
            seq_lens=ints(lengths),
            query_start_loc=ints(starts),
            max_query_len=longest,
            max_seq_len=max(lengths),
            max_num_splits=1,
        )
        if fa_utils.get_flash_attn_version() == 3:
            decode.scheduler_metadata = fa_utils.get_scheduler_metadata(
                batch_size=len(sequences),
                max_seqlen_q=longest,
                max_seqlen_k=max(lengths),
                num_heads_q=heads,
                num_heads_kv=1,
                headdim=q.shape[-1] - latent,
                cache_seqlens=decode.seq_lens,
                qkv_dtype=q.dtype,
                headdim_v=latent,
                page_size=page,
                cu_seqlens_q=decode.query_start_loc,
                causal=True,
                num_splits=1,
            )
        query = q[rows]
        return layer.impl.forward_mqa(
            (query[..., :latent].contiguous(), query[..., latent:].contiguous()), cache, Metadata(decode=decode), layer
        )[0]

    return run


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
        apply=_only_one_form,
        releases=_RELEASES,
        why="a token's form depends on its position, which not every part of vLLM knows",
    ),
)

SEAMS = (
    _seam(
        "step",
        "GPUModelRunner.gather_batch_req_state",
        _step,
        _FORM,
        "bi_patch notes each request's prompt length, and a step with prompt rows runs no graph of decode steps",
        (6, 7, 9),
        _RUNNER,
        until=_BY_POSITION,
    ),
    _seam(
        "keys",
        "_gen_prompt_embeds_extra_hash_keys",
        _keys,
        "a cached block with generated tokens holds latents that a prompt with the same tokens would not have",
        "the hash of such a block also holds the prompt's length",
        (7,),
        "vllm.v1.core.kv_cache_utils",
        until=_BY_POSITION,
    ),
    _seam(
        "step_v1",
        "GPUModelRunner._determine_batch_execution_and_padding",
        _step_v1,
        _FORM,
        "the same in model runner V1",
        (6, 7, 9),
        _RUNNER_V1,
        until=_BY_POSITION,
    ),
    _seam(
        "capture",
        "CudaGraphManager.capture",
        _capture,
        _FORM,
        "a captured step knows no prompt lengths of an earlier step",
        (6,),
        _GRAPHS,
        until=_BY_POSITION,
    ),
    _seam(
        "build",
        "MLACommonMetadataBuilder.build",
        _build,
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
