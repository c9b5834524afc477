"""Layers with a recurrent state on CUDA: the chunks of the bundled kernels lie at fixed positions of a request."""

from __future__ import annotations

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import active
from bi_patch.seams.model import Policy, Seam, Target
from bi_patch.seams.models import cured

_RELEASES = ">=0.33"
# vLLM's names of the states that the kernels keep
_BACKENDS = frozenset({"GDN_ATTN", "MAMBA1", "MAMBA2", "SHORT_CONV"})
_FOLDER = "vllm.model_executor.layers.mamba"
_GDN = f"{_FOLDER}.gdn.qwen_gdn_linear_attn"
_LAYER = "QwenGatedDeltaNetAttention"
_MIXER = f"{_FOLDER}.mamba_mixer2"
_MIXER_1, _SHORT = f"{_FOLDER}.mamba_mixer", f"{_FOLDER}.short_conv"
_UTILS, _SHAPES = f"{_FOLDER}.mamba_utils", "MambaStateShapeCalculator"


def _backend(original):
    """get_mamba_attn_backend: let in the kinds of layers whose states the bundled kernels keep."""

    def get_mamba_attn_backend(mamba_type):
        if mamba_type.name not in _BACKENDS:
            return original(mamba_type)
        held = mamba_type.get_class()
        if not held.supports_batch_invariance():
            before = vars(held).get("supports_batch_invariance")
            held.supports_batch_invariance = classmethod(lambda cls: True)
            active.at_disarm(lambda: _give_back(held, before))
        return held

    return get_mamba_attn_backend


def _few_requests(config) -> None:
    """Refuse more requests than a step's kernels take: inside a step, this would end the engine."""
    from bi_patch.kernels.cuda import nvrtc

    kinds = ("is_hybrid", "is_attention_free", "has_inner_state")
    if not any(getattr(config.model_config, name, False) for name in kinds):
        return
    if (most := config.scheduler_config.max_num_seqs) > nvrtc.MOST_BLOCKS:
        raise UnsupportedFeature(
            f"recurrent.cuda_requests: the kernels of recurrent layers take {nvrtc.MOST_BLOCKS} requests at once, not "
            f"{most}. Lower --max-num-seqs, or set BI_PATCH=0"
        )


def _give_back(held, before) -> None:
    if before is None:
        del held.supports_batch_invariance
    else:
        held.supports_batch_invariance = before


def of_step(layer):
    """vLLM's metadata of a step for a layer, None while vLLM profiles."""
    from vllm.forward_context import get_forward_context

    held = get_forward_context().attn_metadata
    return held.get(layer.prefix) if isinstance(held, dict) else None


def _once(make):
    """make(meta), kept on the metadata, which all layers of a group share."""

    def spans(meta):
        if "bi_patch_spans" not in vars(meta):
            meta.bi_patch_spans = make(meta)
        return meta.bi_patch_spans

    return spans


@_once
def spans_of(meta):
    """The requests of a step of gated delta nets, decodes first."""
    from bi_patch.ops.cuda import recurrent

    slots, tokens = meta.non_spec_state_indices_tensor, meta.num_actual_tokens
    if not meta.num_prefills:
        return recurrent.Spans(slots[:tokens].contiguous())
    starts = meta.non_spec_query_start_loc[: len(slots) + 1]
    return recurrent.spans(slots, starts, ~meta.has_initial_state[: len(slots)], tokens)


@_once
def _spans_in_two(meta):
    """The same of metadata that lists decodes (d) and prompts (p) apart: of Mamba 2."""
    import torch

    from bi_patch.ops.cuda import recurrent

    decodes, prompts = meta.num_decode_tokens, meta.num_prefills  # decodes: one token each
    if not prompts:
        return recurrent.Spans(meta.state_indices_tensor_d[:decodes, 0].contiguous())
    slots, starts = meta.state_indices_tensor_p[:prompts], meta.query_start_loc_p[: prompts + 1] + decodes
    fresh = ~meta.has_initial_states_p[:prompts]
    if decodes:
        slots = torch.cat([meta.state_indices_tensor_d[:decodes, 0], slots])
        starts = torch.cat([torch.arange(decodes, dtype=starts.dtype, device=starts.device), starts])
        fresh = torch.cat([torch.zeros(decodes, dtype=torch.bool, device=fresh.device), fresh])
    return recurrent.spans(slots, starts, fresh, decodes + meta.num_prefill_tokens, prompts)


def _form_of_delta(layer):
    from bi_patch.ops.cuda import recurrent

    heads = layer.num_k_heads // layer.tp_size, layer.num_v_heads // layer.tp_size
    return recurrent.form(False, layer.head_k_dim, layer.head_v_dim, *heads, layer.A_log, layer.dt_bias, None)


def _form_of_mamba2(layer):
    from bi_patch.ops.cuda import recurrent

    sizes = layer.ssm_state_size, layer.head_dim, layer.n_groups // layer.tp_size, layer.num_heads // layer.tp_size
    return recurrent.form(True, *sizes, layer.A, layer.dt_bias, layer.D)


def _core(original):
    """QwenGatedDeltaNetAttention._forward_core: the bundled kernels, for prompts and decodes alike."""
    from bi_patch.ops.cuda import recurrent

    def _forward_core(self, mixed_qkv, b, a, core_attn_out):
        meta = of_step(self)
        if meta is None:
            return
        tokens, weight = meta.num_actual_tokens, self.conv1d.weight
        recurrent.run(
            _form_of_delta(self),
            core_attn_out[:tokens],
            mixed_qkv[:tokens],
            weight.view(weight.size(0), weight.size(-1)),
            None,
            a[:tokens],
            b[:tokens],
            self.A_log,
            self.dt_bias,
            None,
            *self.kv_cache[:2],
            spans_of(meta),
        )

    return _forward_core


def _mamba2(original):
    """MambaMixer2.conv_ssm_forward: the convolution, then Mamba 2's recurrence, for prompts and decodes alike."""
    from bi_patch.ops.cuda import recurrent

    def conv_ssm_forward(self, projected_states, output):
        meta = of_step(self)
        if meta is None:  # vLLM's own warms up its Triton kernels
            output.zero_()
            return
        tokens, weight = meta.num_decode_tokens + meta.num_prefill_tokens, self.conv1d.weight
        sizes = [self.tped_intermediate_size, self.tped_conv_size, self.tped_dt_size]
        _, inputs, dt = projected_states[:tokens].split(sizes, dim=-1)
        recurrent.run(
            _form_of_mamba2(self),
            output[:tokens],
            inputs,
            weight.view(weight.size(0), weight.size(-1)),
            self.conv1d.bias,
            dt,
            None,
            self.A,
            self.dt_bias,
            self.D,
            *self.kv_cache[:2],
            _spans_in_two(meta),
        )

    return conv_ssm_forward


def _short_conv(original):
    """ShortConv.forward_cuda: the bundled kernel between the two projections, for prompts and decodes alike."""
    from bi_patch.ops.cuda import causal_conv

    @functools.wraps(original)
    def forward_cuda(self, hidden_states, output):
        meta = of_step(self)
        if meta is None:
            return original(self, hidden_states=hidden_states, output=output)
        tokens, weight = meta.num_decode_tokens + meta.num_prefill_tokens, self.conv.weight
        y = causal_conv.run(
            self.in_proj(hidden_states[:tokens])[0],
            weight.view(weight.size(0), weight.size(-1)),
            self.conv.bias,
            self.kv_cache[0],
            _spans_in_two(meta),
            gated=True,
        )
        output[:tokens] = self.out_proj(y)[0]

    return forward_cuda


def _mamba1(original):
    """MambaMixer.forward_impl: the convolution and Mamba 1's recurrence, for prompts and decodes alike."""
    from bi_patch.ops.cuda import causal_conv, mamba1

    @functools.wraps(original)
    def forward_impl(self, hidden_states, output):
        meta = of_step(self)
        if meta is None:
            return original(self, hidden_states, output)
        spans, tokens = _spans_in_two(meta), meta.num_decode_tokens + meta.num_prefill_tokens
        inputs, gate = self.in_proj(hidden_states[:tokens])[0].chunk(2, dim=-1)
        weight, (conv_states, states) = self.conv1d.weight, self.kv_cache
        weight = weight.view(weight.size(0), weight.size(-1))
        x = causal_conv.run(inputs, weight, self.conv1d.bias, conv_states, spans, gated=False)
        dt, b, c = self._ssm_transform(x)
        parameters = self.A.float(), self.D.float(), self._time_proj_bias()
        output[:tokens] = self.out_proj(mamba1.run(x, dt.T, b, c, gate, *parameters, states, spans))[0]

    return forward_impl


def shape(dtypes, unknown, prepare):
    """get_state_shape of a layer: refuse what the kernels do not compute, and compile them before any step."""

    def close(original):
        @functools.wraps(original)
        def get_state_shape(self):
            if found := unknown(self) or _unknown_cache(self, self.cache_config, dtypes()):
                raise UnsupportedFeature(
                    f"recurrent.cuda_states: bi_patch does not cover {self.prefix} with {cured(found)}"
                )
            if failed := prepare(self):
                raise UnsupportedFeature(
                    f"recurrent.cuda_states: the kernels of recurrent layers did not compile: {failed}. Set BI_PATCH=0"
                )
            return original(self)

        return get_state_shape

    return close


def _inputs_only():
    import torch

    return (torch.bfloat16,)


def inputs_and_state():
    import torch

    return torch.bfloat16, torch.float32


def _unknown_short_conv(layer) -> str:
    """What the kernel does not compute of a short convolution, in words, else ""."""
    from bi_patch.ops.cuda import causal_conv

    return causal_conv.uncovered(layer.conv.weight.size(0), layer.L_cache)


def _prepare_short_conv(layer) -> str:
    from bi_patch.ops.cuda import causal_conv

    return causal_conv.prepare(layer.conv.weight.size(0), layer.L_cache, gated=True)


def _unknown_mamba1(layer) -> str:
    """What the kernels do not compute of a Mamba 1 layer, in words, else ""."""
    from bi_patch.ops.cuda import causal_conv, mamba1

    if layer.activation not in ("silu", "swish"):
        return f"the activation {layer.activation}; silu works"
    channels = layer.conv1d.weight.size(0)
    return causal_conv.uncovered(channels, layer.conv_kernel_size) or mamba1.uncovered(layer.ssm_state_size)


def _prepare_mamba1(layer) -> str:
    from bi_patch.ops.cuda import causal_conv, mamba1

    channels = layer.conv1d.weight.size(0)
    failed = causal_conv.prepare(channels, layer.conv_kernel_size, gated=False)
    return failed or mamba1.prepare(channels, layer.ssm_state_size)


def _kept(mamba: bool):
    """A shape of MambaStateShapeCalculator: a slot also keeps the tokens of its open chunk."""

    def close(original):
        function = original.__func__

        @functools.wraps(function)
        def state_shape(cls, *args, **kwargs):
            from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

            from bi_patch.ops.cuda import recurrent

            inputs, state = function(cls, *args, **kwargs)
            if is_conv_state_dim_first():  # refused when the layers say what they cache
                return inputs, state
            return recurrent.kept(mamba, inputs, state), state

        return classmethod(state_shape)

    return close


def _states(form_of, unknown):
    """get_kv_cache_spec of a layer: a step ends where a state is cached; refuse what the kernels do not compute."""

    def close(original):
        @functools.wraps(original)
        def get_kv_cache_spec(self, vllm_config):
            from vllm.model_executor.layers.mamba.abstract import MambaBase

            from bi_patch.ops.cuda import recurrent

            if found := unknown(self) or _unknown_states(self, vllm_config):
                raise UnsupportedFeature(
                    f"recurrent.cuda_states: bi_patch does not cover {self.prefix} with {cured(found)}"
                )
            if tuple(self.get_state_shape()[0]) != recurrent.inputs_of(form := form_of(self)):
                raise UnsupportedFeature(
                    f"recurrent.cuda_states: bi_patch does not cover {self.prefix} with states of "
                    f"{self.get_state_shape()}. Leave out options that change the states' layout, or set BI_PATCH=0"
                )
            if failed := recurrent.prepare(form):
                raise UnsupportedFeature(
                    f"recurrent.cuda_states: the kernels of recurrent layers did not compile: {failed}. Set BI_PATCH=0"
                )
            return MambaBase.get_kv_cache_spec(self, vllm_config)

        return get_kv_cache_spec

    return close


def _unknown_states(layer, config) -> str:
    """What the kernels do not keep of a layer's states, in words, else ""."""
    import torch

    if config.model_config.dtype != torch.bfloat16:
        return f"inputs in {config.model_config.dtype}. Use --dtype bfloat16"
    return _unknown_cache(layer, config.cache_config, (torch.bfloat16, torch.float32))


def _unknown_cache(layer, config, dtypes) -> str:
    """The same of the cache. dtypes: of the states that the kernels keep."""
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

    found = tuple(layer.get_state_dtype())
    if found != dtypes or is_conv_state_dim_first():
        way = "--mamba-ssm-cache-dtype float32 " * (len(dtypes) > 1)
        return (
            f"states kept in {found}. Use --dtype bfloat16 {way}--mamba-cache-dtype auto, and unset "
            "VLLM_SSM_CONV_STATE_LAYOUT"
        )
    if config.mamba_cache_mode not in ("none", "align"):
        return f"the cache mode {config.mamba_cache_mode!r}. Use --mamba-cache-mode align"
    return ""


def _unknown_delta(layer) -> str:
    """What the kernels do not compute of a gated delta net, in words, else ""."""
    from bi_patch.ops.cuda import recurrent

    if layer.activation != "silu":
        return f"the activation {layer.activation}; silu works"
    heads = layer.num_k_heads // layer.tp_size, layer.num_v_heads // layer.tp_size
    return recurrent.uncovered(layer.head_k_dim, layer.head_v_dim, *heads, layer.conv_kernel_size)


def _unknown_mamba2(layer) -> str:
    """What the kernels do not compute of a Mamba 2 layer, in words, else ""."""
    from bi_patch.ops.cuda import recurrent

    if layer.activation not in ("silu", "swish"):
        return f"the activation {layer.activation}; silu works"
    if layer.use_replayssm:
        return "--use-replayssm. Leave it out"
    if layer.tp_size > 1 and layer.use_rms_norm:
        return f"a norm over {layer.tp_size} ranks. Use --tensor-parallel-size 1"
    heads = layer.n_groups // layer.tp_size, layer.num_heads // layer.tp_size
    return recurrent.uncovered(layer.ssm_state_size, layer.head_dim, *heads, layer.conv_kernel_size)


def _no_alignment(original):
    """QwenGatedDeltaNetAttention.get_prefill_checkpoint_alignment: the kernels write no state inside a prompt."""

    def get_prefill_checkpoint_alignment(self):
        return None

    return get_prefill_checkpoint_alignment


def _gated(original):
    """RMSNormGated.forward_cuda, and forward_native for compiled code: the bundled kernel."""
    from bi_patch.ops.cuda import recurrent

    recurrent.define_ops()

    def forward(self, x, z=None):
        if z is None or not self.norm_before_gate or self.group_size not in (None, x.shape[-1]):
            raise UnsupportedFeature(
                "recurrent.cuda_gated_norm: bi_patch covers RMSNorm of whole rows with a gate after it. Use another "
                "model, or set BI_PATCH=0"
            )
        return recurrent.gated_rms_norm(x, z, self.weight.data, self.eps, self.activation == "sigmoid")

    return forward


def _gated_first(original):
    """Mixer2RMSNormGated.forward_cuda, and forward_native for compiled code: the bundled kernel."""
    from bi_patch.ops.cuda import recurrent

    recurrent.define_ops()

    def forward(self, x, gate):
        import torch

        if not self.use_rms_norm:
            return x * torch.nn.functional.silu(gate.to(torch.float32)).to(x.dtype)
        return recurrent.gated_first_rms_norm(x, gate, self.weight.data, self.variance_epsilon, self.n_groups)

    return forward


def _attention(original):
    """Qwen3NextAttention.__init__: norm, rotate and gate by the operations that other models use."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.use_fused_qk_norm_rope_gate = False

    return __init__


def _seam(name: str, module: str, qualname: str, close, how: str, copies=(), serves=()) -> Seam:
    return Seam(
        name=name,
        targets=(Target(module, qualname, _RELEASES, copies),),
        close=close,
        why="the stock kernels start their chunks where an engine step starts, and decode by other kernels",
        how=how,
        until="upstream's kernels place their chunks by position, and decode has the bits of prefill",
        causes=(24,),
        serves=serves,
        op="bi_patch.ops.cuda.recurrent",
    )


_TOKENS = (
    "the bundled kernels place chunks of eight tokens by position, compute an open chunk again with each token, and "
    "keep the state in fp32"
)
_ENDS = "a step ends where a state is cached, and other dtypes of states are refused"
_NORMS = "vllm.model_executor.layers.layernorm"

POLICIES = (
    Policy(
        name="recurrent.cuda_requests",
        apply=_few_requests,
        releases=_RELEASES,
        why="the kernels of recurrent layers give each request of a step a block of a grid, whose size is limited",
    ),
)

SEAMS = (
    _seam(
        "recurrent.cuda_backend",
        "vllm.v1.attention.selector",
        "get_mamba_attn_backend",
        _backend,
        "gated delta nets, Mamba 1, Mamba 2 and short convolutions may start",
        (f"{_FOLDER}.abstract",),
    ),
    _seam("recurrent.cuda_gated_delta_net", _GDN, f"{_LAYER}._forward_core", _core, _TOKENS, serves=(_LAYER,)),
    _seam("recurrent.cuda_states", _GDN, f"{_LAYER}.get_kv_cache_spec", _states(_form_of_delta, _unknown_delta), _ENDS),
    *(
        _seam(
            f"recurrent.cuda_{name}_shape",
            _UTILS,
            f"{_SHAPES}.{method}",
            _kept(mamba),
            "a slot also keeps the tokens of its open chunk, so that the state is written at the ends of chunks only",
        )
        for name, method, mamba in (
            ("gated_delta_net", "gated_delta_net_state_shape", False),
            ("mamba2", "mamba2_state_shape", True),
        )
    ),
    _seam(
        "recurrent.cuda_alignment",
        _GDN,
        f"{_LAYER}.get_prefill_checkpoint_alignment",
        _no_alignment,
        "no layer offers to write states inside a prompt",
    ),
    _seam("recurrent.cuda_mamba2", _MIXER, "MambaMixer2.conv_ssm_forward", _mamba2, _TOKENS, serves=("MambaMixer2",)),
    _seam(
        "recurrent.cuda_mamba2_states",
        _MIXER,
        "MambaMixer2.get_kv_cache_spec",
        _states(_form_of_mamba2, _unknown_mamba2),
        _ENDS,
    ),
    _seam(
        "recurrent.cuda_short_conv",
        _SHORT,
        "ShortConv.forward_cuda",
        _short_conv,
        "a bundled kernel takes a request's own inputs in one order, in prompts and decodes",
        serves=("ShortConv",),
    ),
    _seam(
        "recurrent.cuda_short_conv_states",
        _SHORT,
        "ShortConv.get_state_shape",
        shape(_inputs_only, _unknown_short_conv, _prepare_short_conv),
        _ENDS,
    ),
    _seam(
        "recurrent.cuda_mamba1",
        _MIXER_1,
        "MambaMixer.forward_impl",
        _mamba1,
        "the bundled kernels take one token after the other, in prompts and decodes, and keep the state in fp32",
        serves=("MambaMixer",),
    ),
    _seam(
        "recurrent.cuda_mamba1_states",
        _MIXER_1,
        "MambaMixer.get_state_shape",
        shape(inputs_and_state, _unknown_mamba1, _prepare_mamba1),
        _ENDS,
    ),
    *(
        _seam(
            f"recurrent.cuda_gated_norm{suffix}",
            _NORMS,
            f"RMSNormGated.{method}",
            _gated,
            "a program norms whole rows and multiplies by their gates",
            serves=("RMSNormGated",),
        )
        for suffix, method in (("", "forward_cuda"), ("_compiled", "forward_native"))
    ),
    *(
        _seam(
            f"recurrent.cuda_mixer_norm{suffix}",
            _MIXER,
            f"Mixer2RMSNormGated.{method}",
            _gated_first,
            "a program multiplies whole groups of rows by their gates and norms them",
            serves=("Mixer2RMSNormGated",),
        )
        for suffix, method in (("", "forward_cuda"), ("_compiled", "forward_native"))
    ),
    _seam(
        "recurrent.cuda_attention",
        "vllm.model_executor.models.qwen3_next",
        "Qwen3NextAttention.__init__",
        _attention,
        "norm, rotation and gate run by the operations that other models use",
    ),
)
