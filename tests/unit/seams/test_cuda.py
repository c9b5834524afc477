"""The CUDA seams: every release has their targets and anchors, and the policies refuse by name what is not covered."""

import contextlib
import dataclasses
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from bi_patch.arming.catalog import CATALOG, plan
from bi_patch.errors import UnsupportedFeature
from bi_patch.platforms.releases import BY_PLATFORM
from bi_patch.seams import active, anchors

RELEASES = BY_PLATFORM["cuda"]
NONE = SimpleNamespace(name="NONE")  # vLLM's compilation mode


def config(**changes):
    """A configuration that every CUDA policy accepts, with changes to its parts, e.g. model__quantization="fp8"."""
    parts = {
        "model": {
            "runner_type": "generate",
            "is_multimodal_model": False,
            "is_encoder_decoder": False,
            "is_hybrid": False,
            "use_mla": False,
            "quantization": None,
            "disable_cascade_attn": False,
            "hf_text_config": SimpleNamespace(),
            "using_transformers_backend": lambda: False,
            "architectures": ["Qwen3ForCausalLM"],
        },
        "parallel": {
            "tensor_parallel_size": 1,
            "data_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "enable_dbo": False,
            "pipeline_parallel_size": 1,
            "enable_expert_parallel": False,
            "enable_eplb": False,
            "disable_custom_all_reduce": False,
        },
        "cache": {"cache_dtype": "auto", "block_size": 16},
        "compilation": {
            "pass_config": SimpleNamespace(),
            "custom_ops": ["none"],
            "compile_sizes": [],
            "mode": SimpleNamespace(name="VLLM_COMPILE"),
        },
        "speculative": None,
        "lora": None,
        "kv_transfer": None,
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            parts[part][field] = value
        else:
            parts[part] = value
    held = {name: SimpleNamespace(**part) if isinstance(part, dict) else part for name, part in parts.items()}
    return SimpleNamespace(**{f"{name}_config": part for name, part in held.items()})


def cuda_policies():
    return [policy for policy in CATALOG.policies if "cuda" in policy.platforms]


@pytest.mark.parametrize("release", RELEASES)
def test_every_seam_has_an_anchor(release):
    made = plan(Version(release), "cuda")
    recorded = {name: anchor.target for name, anchor in anchors.read(anchors.folder_of(release)).by_seam().items()}
    areas = {planned.seam.area for planned in made.seams}
    assert {"linear", "norm", "moe", "attention", "sampling", "compilation", "engine"} <= areas
    missing = [p.seam.name for p in made.seams if recorded.get(p.seam.name) != str(p.target)]
    assert not missing


@pytest.mark.parametrize("release", RELEASES)
def test_variables_forbid_split_k_and_other_sums(release):
    values = {s.variable: s.value for s in plan(Version(release), "cuda").variables if s.force}
    assert values["CUBLASLT_WORKSPACE_SIZE"] == "1"
    assert values["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert values["VLLM_CUSTOM_ALLREDUCE_ALGO"] == "1stage"
    assert values["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert values["TORCHINDUCTOR_DETERMINISTIC"] == "1"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"parallel__tensor_parallel_size": 4},
        {"parallel__data_parallel_size": 2, "model__is_moe": False, "parallel__pipeline_parallel_size": 2},
        {"model__architectures": ["Cohere2ForCausalLM"]},
        {
            "model__using_transformers_backend": lambda: True,
            "model__max_model_len": 4096,
            "model__hf_text_config": SimpleNamespace(
                rope_parameters={"rope_type": "dynamic", "alpha": 1000.0}, max_position_embeddings=4096
            ),
        },
        {"model__architectures": ["MiniCPMForCausalLM"]},
        {
            "model__using_transformers_backend": lambda: True,
            "model__hf_text_config": SimpleNamespace(rope_parameters={"rope_type": "yarn"}),
        },
        {
            "parallel__tensor_parallel_size": 4,
            "parallel__disable_custom_all_reduce": True,
            "model__enforce_eager": True,
        },
    ],
)
def test_a_plain_configuration_passes(change):
    held = config(**change)
    for policy in cuda_policies():
        policy.apply(held)
    assert "+silu_and_mul" in held.compilation_config.custom_ops
    assert held.model_config.disable_cascade_attn


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model__quantization": "modelopt"}, "quantized weights .modelopt"),
        ({"model__quantization": "fp8", "model__use_mla": True}, "quantized weights with MLA .fp8"),
        ({"compilation__custom_ops": ["all", "-silu_and_mul"]}, "custom_ops has -silu_and_mul"),
        ({"cache__cache_dtype": "fp8_e5m2"}, "'fp8_e5m2' KV cache"),
        ({"cache__cache_dtype": "fp8", "lora": SimpleNamespace()}, "an FP8 KV cache with LoRA"),
        ({"model__use_mla": True, "model__hf_text_config": SimpleNamespace(index_topk=8)}, "sparse MLA"),
        ({"model__is_hybrid": True}, "hybrid"),
        ({"model__is_multimodal_model": True, "model__architectures": ["Other"]}, "language-model-only"),
        ({"speculative": SimpleNamespace()}, "speculative decoding"),
        ({"model__architectures": ["HrmTextForCausalLM"]}, "does not cover HrmTextForCausalLM"),
        ({"model__architectures": ["DeepseekV4ForCausalLM"]}, "kernels of their own"),
        ({"model__architectures": ["CohereForCausalLM"], "compilation__mode": NONE}, "without compilation"),
        (
            {"model__architectures": ["MiniCPMForCausalLM"], "model__hf_text_config": SimpleNamespace(num_experts=8)},
            "experts' tiles",
        ),
        (
            {
                "model__using_transformers_backend": lambda: True,
                "model__hf_text_config": SimpleNamespace(rope_parameters={"full": {"rope_type": "dynamic"}}),
            },
            "rotation of type dynamic",
        ),
        (
            {
                "model__using_transformers_backend": lambda: True,
                "model__max_model_len": 8192,
                "model__hf_text_config": SimpleNamespace(
                    rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 4096},
                    max_position_embeddings=8192,
                ),
            },
            "rotation of type longrope.*original_max_position_embeddings",
        ),
        ({"compilation__compile_sizes": [8]}, r"compile_sizes \[8\]"),
        ({"cache__block_size": 144}, "pages of 144 tokens"),
        ({"kv_transfer": SimpleNamespace()}, "KV transfer"),
        ({"parallel__data_parallel_size": 2, "model__is_moe": True}, "data parallelism"),
        ({"compilation__mode": SimpleNamespace(name="STOCK_TORCH_COMPILE")}, "cuda_mode: .*STOCK_TORCH_COMPILE"),
        ({"compilation__mode": SimpleNamespace(name="DYNAMO_TRACE_ONCE")}, "cuda_mode: .*DYNAMO_TRACE_ONCE"),
        ({"parallel__enable_expert_parallel": True, "parallel__pipeline_parallel_size": 2}, "expert parallelism"),
        ({"parallel__enable_eplb": True}, "expert load balancing"),
        (
            {"parallel__tensor_parallel_size": 2, "compilation__pass_config": SimpleNamespace(enable_sp=True)},
            "enable_sp",
        ),
    ],
)
def test_what_is_not_covered_is_refused_by_name(change, named):
    held = config(**change)
    with pytest.raises(UnsupportedFeature, match=named):
        for policy in cuda_policies():
            policy.apply(held)


@pytest.mark.parametrize(("release", "refused"), [("0.32.0", True), ("0.33.0", False)])
def test_gemma3n_in_eager_mode_is_refused_before_0_33(release, refused, monkeypatch):
    monkeypatch.setattr(active, "plan", plan(Version(release), "cuda"))
    held = config(model__architectures=["Gemma3nForCausalLM"], compilation__mode=NONE)
    with pytest.raises(UnsupportedFeature, match="without compilation") if refused else contextlib.nullcontext():
        active.apply_policies(held)


def test_fused_all_reduce_is_turned_off_with_its_range():
    held = config(
        compilation__pass_config=SimpleNamespace(fuse_allreduce_rms=True),
        compilation__compile_ranges_endpoints=[64, 512, 8192],
    )
    for _ in range(2):  # in the engine, and again in each worker
        for policy in cuda_policies():
            policy.apply(held)
        assert held.compilation_config.pass_config.fuse_allreduce_rms is False
        assert held.compilation_config.compile_ranges_endpoints == [8192]


@pytest.mark.parametrize("given, refused", [(["native"], False), (["vllm_c", "native"], True)])
def test_chosen_operators_are_refused(given, refused, monkeypatch):
    from vllm.platforms import current_platform

    @dataclasses.dataclass
    class Priority:
        rms_norm: list
        fused_add_rms_norm: list = dataclasses.field(default_factory=lambda: ["native"])

    platform = type(current_platform)
    monkeypatch.setattr(platform, "get_default_ir_op_priority", classmethod(lambda cls, config: Priority(["native"])))
    held = config(kernel=SimpleNamespace(ir_op_priority=Priority(given)))
    with (
        pytest.raises(UnsupportedFeature, match="ir_op_priority for rms_norm") if refused else contextlib.nullcontext()
    ):
        for policy in cuda_policies():
            policy.apply(held)


def _closed(name, original):
    planned = plan(Version(RELEASES[-1]), "cuda").seams
    return next(p.seam for p in planned if p.seam.name == name).close(original)


class Attention:
    """The part of vLLM's attention layer that the seam attention.cuda_backend reads."""

    def __init__(self, backend, head_size, window, version=3, attn_type="decoder", attn_backend=None):
        self.attn_backend = attn_backend or SimpleNamespace(get_name=lambda: backend)
        self.impl = SimpleNamespace(vllm_flash_attn_version=version)
        self.head_size, self.sliding_window = head_size, window


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("FLASHINFER", 128, None), "FLASHINFER backend"),
        (("FLASH_ATTN", 72, None), "heads of 72"),
        (("FLASH_ATTN", 128, 512), "window .of 512 tokens"),
        (("FLASH_ATTN", 128, None, 2), "FlashAttention 2"),
        (("TRITON_ATTN", 80, None, 3, "encoder"), "encoder attention"),
        (("FLASH_ATTN", 80, None, 3, "encoder_only"), "FlashAttention without a cache .* heads of 80"),
        (("FLASH_ATTN", 64, 65, 3, "encoder_only"), None),
        (("TRITON_ATTN", 64, 65, 3, "encoder_only"), None),
        (("FLASH_ATTN", 64, None), None),
        (("FLASH_ATTN", 128, None), None),
        (("TRITON_ATTN", 80, 512), None),
    ],
)
def test_attention_layers_that_were_not_shown_are_refused(arguments, named, monkeypatch):
    from bi_patch.seams.cuda import attention as attention_cuda

    monkeypatch.setattr(attention_cuda, "_chosen", lambda: True)
    monkeypatch.setattr(attention_cuda, "_flash_version", lambda arguments: 3)
    monkeypatch.setattr(Attention, "__init__", _closed("attention.cuda_backend", Attention.__init__))
    if named is None:
        Attention(*arguments)
        return
    with pytest.raises(UnsupportedFeature, match=named):
        Attention(*arguments)


class Experts(torch.nn.Module):
    """A fake of vLLM's experts with loaded weights: 4 experts, 6 elements wide between the two products."""

    def __init__(self):
        super().__init__()
        self.w13_weight, self.w2_weight = (Weight(*shape) for shape in ((4, 12, 8), (4, 8, 6)))
        self.w13_bias = Weight(4, 12)
        self.moe_config = SimpleNamespace(experts_per_token=2, activation=SimpleNamespace(value="swigluoai"))


class Weight:
    """A fake of a weight on a GPU."""

    is_cuda, dtype = True, torch.bfloat16

    def __init__(self, *shape):
        self.shape, self.ndim = shape, len(shape)


class UnquantizedLinearMethod:
    pass


def test_a_loaded_model_is_certified_whole(monkeypatch):
    """When the weights are loaded, the seam certifies every operation in one call."""
    from bi_patch.ops.cuda import attention, certify, linear, moe
    from bi_patch.seams.cuda import attention as attention_cuda

    class Model(torch.nn.Module):
        def load_weights(self, weights): ...

    model = Model()
    model.linear, model.experts = torch.nn.Module(), Experts()
    model.linear.weight, model.linear.quant_method = Weight(24, 8), UnquantizedLinearMethod()
    layers = []
    for backend, heads in (("FLASH_ATTN", 8), ("TRITON_ATTN", 8), ("FLASH_ATTN", 4)):
        layers.append(Attention(backend, 128, None))
        layers[-1].num_heads, layers[-1].num_kv_heads, layers[-1].dtype = heads, 2, torch.bfloat16
    held = {str(i): layer for i, layer in enumerate([*layers, object()])}
    vllm = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512),
        parallel_config=SimpleNamespace(data_parallel_size=1),
        compilation_config=SimpleNamespace(static_forward_context=held),
        model_config=SimpleNamespace(dtype=torch.bfloat16, get_vocab_size=lambda: 100),
    )
    fused = SimpleNamespace(fused_experts=len, try_get_optimal_moe_config=lambda *known: known)
    for name, stand_in in {
        "vllm.version": SimpleNamespace(__version__=RELEASES[-1]),
        "vllm.model_executor.layers.attention.attention": SimpleNamespace(Attention=Attention),
        "vllm.model_executor.layers.fused_moe": SimpleNamespace(fused_moe=fused, override_config="override"),
    }.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setenv("VLLM_TRITON_USE_TD", "1")
    order, made = [], {}

    def certified(linears, experts, decoders, attentions, checks, **more):
        order.append("certified")
        made.update(more, linears=[*linears], experts=[*experts], decoders=[*decoders])

    monkeypatch.setattr(certify, "begin", lambda checks, library, cache: order.append("begun") or library)
    monkeypatch.setattr(certify, "certify", certified)
    worker = SimpleNamespace(vllm_config=vllm, get_model=lambda: model)
    load = _closed("linear.cuda_certify", lambda self, **_: order.append("loaded") or "done")
    assert load(worker, load_dummy_weights=True) == "done" and order == ["begun", "loaded", "certified"]
    assert made["linears"] == [linear.Problem(24, 8, torch.bfloat16, False)]
    ((problem, kernel),) = made["experts"]
    assert problem == moe.Problem(4, 6, 8, 2, torch.bfloat16, "swigluoai", True)
    assert kernel.choose(7) == ((4, 12, 8), (4, 8, 6), 2, None, 7) and kernel.override == "override"
    assert made["decoders"] == [
        (attention.Problem(heads, 2, 128, torch.bfloat16), attention_cuda.prefill) for heads in (8, 4)
    ]
    assert made["max_rows"] == 512 and made["library"] == made["ahead"] == f"vllm {RELEASES[-1]} descriptors=1"


@pytest.mark.parametrize(("kind", "size", "covered"), [("RotaryEmbedding", 128, True), ("RotaryEmbedding", 96, False)])
@pytest.mark.parametrize("other", [False, True])
def test_which_rotations_the_bundled_kernel_takes(kind, size, covered, other, monkeypatch):
    from bi_patch.ops.cuda import rotary

    taken = []
    monkeypatch.setattr(rotary, "rope", lambda *given: taken.append("bundled"))
    forward = _closed("rotary.cuda_forward", lambda self, *given: taken.append("vLLM's own"))
    layer = type("MRotaryEmbedding" if other else kind, (), {"_match_cos_sin_cache_dtype": lambda self, x: x})()
    layer.head_size = layer.rotary_dim = size
    layer.is_neox_style = True
    forward(layer, torch.arange(3), torch.zeros(3, size), torch.zeros(3, size))
    assert taken == ["bundled" if covered and not other else "vLLM's own"]


@pytest.mark.parametrize(("shape", "sections"), [((3, 5), [24, 20, 20]), ((5,), [24, 20, 20]), ((3, 5), None)])
def test_compiled_rotations_by_sections_are_vllms_kernel(shape, sections, monkeypatch):
    taken = []
    forward = _closed("rotary.cuda_sections", lambda *given: taken.append("native"))
    monkeypatch.setattr(torch.ops.vllm, "mrope", lambda *given: taken.append(given[4:]), raising=False)
    layer = SimpleNamespace(
        head_size=128,
        rotary_dim=128,
        mrope_section=sections,
        mrope_interleaved=True,
        is_neox_style=True,
        _match_cos_sin_cache_dtype=lambda x: x,
    )
    query, key = torch.ones(5, 256), torch.ones(5, 128)
    made = forward(layer, torch.zeros(shape, dtype=torch.int64), query, key)
    if len(shape) == 2 and sections:
        assert taken == [(128, 128, 24, 20, 20, True, True)]
        assert torch.equal(made[0], query) and made[0].data_ptr() != query.data_ptr()
    else:
        assert taken == ["native"]


@pytest.mark.parametrize(
    ("given", "version", "chosen", "served"),
    [
        ({}, 3, False, "X"),
        ({}, 2, False, "TRITON"),  # e.g. another GPU
        ({"per_layer_sliding_window": 512}, 3, False, "TRITON"),
        ({"cache_config": SimpleNamespace(sliding_window=512)}, 3, False, "TRITON"),
        ({"cache_config": SimpleNamespace(sliding_window=512)}, 3, True, "X"),
        ({"cache_config": SimpleNamespace(sliding_window=None, cache_dtype="fp8")}, 3, False, "TRITON"),
        ({"cache_config": SimpleNamespace(sliding_window=None, cache_dtype="auto")}, 3, False, "X"),
        ({"quant_config": SimpleNamespace(kv_cache_scheme={"num_bits": 8})}, 3, False, "TRITON"),
        ({"quant_config": SimpleNamespace(kv_cache_scheme=None)}, 3, False, "X"),
        (  # an argument of the engine wins over the checkpoint
            {
                "quant_config": SimpleNamespace(kv_cache_scheme={"num_bits": 8}),
                "cache_config": SimpleNamespace(sliding_window=None, cache_dtype="bfloat16"),
            },
            3,
            False,
            "X",
        ),
        ({"alibi_slopes": [0.5]}, 3, False, "TRITON"),
        ({"head_size": 72}, 3, False, "TRITON"),
        ({"sinks": torch.zeros(2)}, 3, False, "X"),
    ],
)
def test_layers_go_to_triton_where_flash_attention_cannot_serve(given, version, chosen, served, monkeypatch):
    from bi_patch.seams.cuda import attention as attention_cuda

    class Layer:
        def __init__(
            self,
            head_size,
            alibi_slopes=None,
            per_layer_sliding_window=None,
            cache_config=None,
            quant_config=None,
            attn_backend="X",
            **extra_impl_args,
        ):
            self.given = attn_backend

    utilities = SimpleNamespace(get_flash_attn_version=lambda head_size=None, has_sinks=False: version)
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.fa_utils", utilities)

    monkeypatch.setattr(attention_cuda, "_chosen", lambda: chosen)
    monkeypatch.setattr(attention_cuda, "_triton", lambda: "TRITON")
    monkeypatch.setattr(attention_cuda, "_refuse_layer", lambda *_: None)
    monkeypatch.setattr(Layer, "attn_backend", SimpleNamespace(get_name=lambda: "TRITON_ATTN"), raising=False)
    monkeypatch.setattr(Layer, "__init__", _closed("attention.cuda_backend", Layer.__init__))
    assert Layer(**{"head_size": 128, **given}).given == served


@pytest.mark.parametrize(
    ("given", "replaced", "served"),
    [
        ({}, True, "X"),
        ({"head_size": 64}, True, "X"),
        ({"head_size": 256, "num_heads": 16, "num_kv_heads": 2}, True, "X"),
        ({"extra_impl_args": {"sinks": None}}, True, "X"),
        ({}, False, "TRITON"),  # vLLM's FlashAttention as it is
        ({"head_size": 96}, True, "TRITON"),
        ({"num_heads": 34, "num_kv_heads": 2}, True, "TRITON"),
        ({"logits_soft_cap": 30.0}, True, "TRITON"),
        ({"extra_impl_args": {"sinks": torch.zeros(2)}}, True, "TRITON"),
        ({"extra_impl_args": {"chunk_lookback": 2}}, True, "TRITON"),
        ({"alibi_slopes": [0.5]}, True, "TRITON"),
        ({"per_layer_sliding_window": 512}, True, "TRITON"),
        ({"kv_sharing_target_layer_name": "layers.1"}, True, "TRITON"),
        ({"attn_type": "encoder_only"}, True, "TRITON"),
        ({"kind": "fp8_e5m2"}, True, "TRITON"),
    ],
)
def test_which_layers_with_an_fp8_kv_cache_run_on_flash_attention(given, replaced, served, monkeypatch):
    from bi_patch.seams.cuda import attention as attention_cuda
    from bi_patch.seams.cuda import eighths

    monkeypatch.setattr(attention_cuda, "_flash_version", lambda arguments: 3)
    monkeypatch.setattr(eighths, "replaced", lambda: replaced)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    given = dict(given)
    cache = SimpleNamespace(sliding_window=None, cache_dtype=given.pop("kind", "fp8"))
    arguments = {"num_heads": 32, "num_kv_heads": 8, "head_size": 128, "cache_config": cache, **given}
    assert attention_cuda._flash_serves(arguments) == (served == "X")
    asked = {"quant_config": SimpleNamespace(kv_cache_scheme={}), "cache_config": None}
    if cache.cache_dtype == "fp8":  # the same by a checkpoint
        assert attention_cuda._flash_serves(arguments | asked) == (served == "X")


def test_layers_with_an_fp8_kv_cache_are_compared_with_the_copys_prefill(monkeypatch):
    from bi_patch.ops.cuda import attention
    from bi_patch.ops.cuda import eighths as ops
    from bi_patch.seams.cuda import attention as attention_cuda
    from bi_patch.seams.cuda import eighths

    layer, other = Attention("FLASH_ATTN", 128, None), Attention("FLASH_ATTN", 64, None)
    for at, kind in ((layer, "fp8"), (other, "auto")):
        at.num_heads, at.num_kv_heads, at.dtype, at.kv_cache_dtype = 32, 8, torch.bfloat16, kind
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"a": layer, "b": other}),
        model_config=SimpleNamespace(max_model_len=1 << 20),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
    )
    stand_in = SimpleNamespace(Attention=Attention)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.attention.attention", stand_in)
    assert [*attention_cuda.decoders(config)] == [
        (attention.Problem(32, 8, 128, torch.bfloat16, torch.float8_e4m3fn), eighths.prefill),
        (attention.Problem(32, 8, 64, torch.bfloat16), attention_cuda.prefill),
    ]
    made = []
    monkeypatch.setattr(ops, "reserve", made.append)
    eighths.reserve(config)
    assert made == [ops.bytes_of(8, 128, 1 << 20, 8192)]
    problem = attention.Problem(32, 8, 128, torch.bfloat16, torch.float8_e4m3fn)
    monkeypatch.setitem(attention._certified, problem, True)
    eighths.require(config)
    monkeypatch.setitem(attention._certified, problem, False)
    with pytest.raises(UnsupportedFeature, match="its certificate failed.* --attention-backend TRITON_ATTN"):
        eighths.require(config)
    layer.kv_cache_dtype = "auto"
    eighths.reserve(config)
    eighths.require(config)
    assert len(made) == 1


def test_a_step_over_an_fp8_kv_cache_gets_its_plan_and_no_schedule(monkeypatch):
    from bi_patch.seams.cuda import eighths

    builder = SimpleNamespace(headdim=64, num_heads_q=32, num_heads_kv=8, kv_cache_dtype=torch.uint8, aot_schedule=True)
    builder.model_config = SimpleNamespace(dtype=torch.bfloat16)
    monkeypatch.setattr(eighths, "step_of", lambda builder, common: ("plan", common.max_query_len))
    common = dataclasses.make_dataclass("Common", ["max_query_len"])
    build = _closed("attention.cuda_longest_query", lambda self, prefix, common: SimpleNamespace(common=common))
    assert build(builder, 0, common(5)).bi_patch_step == ("plan", 128)
    assert not hasattr(build(builder, 0, common(1)), "bi_patch_step")
    schedule = _closed("attention.cuda_schedule", lambda self, **_: "schedule")
    assert schedule(builder, aot_schedule=False, max_num_splits=1, causal=True, max_query_len=5) is None


def test_an_fp8_kv_cache_meets_queries_of_16_bits_on_triton_attention_alone(monkeypatch):
    from bi_patch.seams.cuda import attention as attention_cuda
    from bi_patch.seams.cuda import chunks

    class Layer(Attention):
        def __init__(self, backend, kind):
            super().__init__(backend, 128, None)
            self.kv_cache_dtype, self.query_quant = kind, "rounds"

    monkeypatch.setattr(attention_cuda, "_chosen", lambda: True)
    monkeypatch.setattr(Layer, "__init__", _closed("attention.cuda_backend", Layer.__init__))
    layer = Layer("TRITON_ATTN", "fp8")
    assert layer.query_quant is None and chunks.is_eighth(layer)
    assert Layer("TRITON_ATTN", "auto").query_quant == "rounds"
    with pytest.raises(UnsupportedFeature, match="adds tiles in pairs.* Use --attention-backend TRITON_ATTN"):
        Layer("FLASH_ATTN", "fp8_e4m3")
    layer.num_heads, layer.num_kv_heads, layer.dtype, layer.attn_type = 8, 2, torch.bfloat16, "decoder"
    layer._k_scale = layer._v_scale = torch.ones(())
    assert chunks._problem(layer, 16).extras == "e4m3 KV"
    layer._v_scale = torch.ones(2)
    with pytest.raises(UnsupportedFeature, match="a scale for each head"):
        chunks._problem(layer, 16)
    layer.attn_backend.get_name = lambda: "FLASH_ATTN"
    assert chunks._problem(layer, 16).extras == "e4m3 KV scales by head"


def test_encoders_go_to_triton_where_flash_attention_was_not_shown(monkeypatch):
    from bi_patch.seams.cuda import attention as attention_cuda

    class Layer:
        def __init__(self, head_size, attn_type="decoder", attn_backend=None):
            self.given = attn_backend

    monkeypatch.setattr(attention_cuda, "_encoder_backend", lambda: "ENCODERS ON TRITON")
    monkeypatch.setattr(attention_cuda, "_refuse_layer", lambda *_: None)
    monkeypatch.setattr(Layer, "__init__", _closed("attention.cuda_backend", Layer.__init__))
    for chosen, version, size, served in (
        (False, 3, 64, "VLLM'S"),
        (False, 3, 80, "ENCODERS ON TRITON"),
        (False, 2, 64, "ENCODERS ON TRITON"),
        (True, 2, 64, "VLLM'S"),
    ):
        monkeypatch.setattr(attention_cuda, "_chosen", lambda chosen=chosen: chosen)
        monkeypatch.setattr(attention_cuda, "_flash_version", lambda arguments, version=version: version)
        # vLLM's layer of encoders names a backend itself, made of the one that it would take.
        assert Layer(size, attn_type="encoder_only", attn_backend="VLLM'S").given == served


@pytest.mark.parametrize(
    ("head", "longest", "certified", "told"),
    [(64, 1, False, 128), (64, 1, True, 1), (64, 2, True, 128), (64, 500, True, 500), (128, 1, False, 1)],
)
def test_a_decode_with_small_heads_is_told_a_long_query_unless_it_has_its_own_kernel(
    head, longest, certified, told, monkeypatch
):
    from bi_patch.ops.cuda import attention

    build = _closed("attention.cuda_longest_query", lambda self, prefix, common, fast_build=False: common)
    common = dataclasses.make_dataclass("Common", ["max_query_len"])(longest)
    problem = attention.Problem(32, 8, head, "bf16")
    monkeypatch.setitem(attention._certified, problem, certified)
    builder = SimpleNamespace(headdim=head, num_heads_q=32, num_heads_kv=8, kv_cache_dtype="bf16")
    assert build(builder, 0, common).max_query_len == told


@pytest.mark.parametrize(
    ("longest", "certified", "aot", "asked"),
    [(1, True, True, None), (1, False, True, True), (5, True, True, True), (5, False, False, False)],
)
def test_tiles_are_ordered_once_a_step_unless_the_bundled_kernel_decodes(longest, certified, aot, asked, monkeypatch):
    from bi_patch.ops.cuda import attention

    schedule = _closed("attention.cuda_schedule", lambda self, aot_schedule, max_num_splits, **_: aot_schedule)
    monkeypatch.setitem(attention._certified, attention.Problem(32, 8, 128, "bf16"), certified)
    builder = SimpleNamespace(headdim=128, num_heads_q=32, num_heads_kv=8, kv_cache_dtype="bf16", aot_schedule=aot)
    got = schedule(builder, aot_schedule=False, max_num_splits=1, causal=True, max_query_len=longest)
    assert got is asked


def flash_call(**changes):
    """The arguments that vLLM passes to FlashAttention 3 for a batch of three single queries."""
    cache = torch.zeros(4, 16, 2, changes.pop("head", 64))
    q = torch.zeros(3, 8, cache.shape[-1])
    given = {
        "q": q,
        "k": cache,
        "v": cache,
        "out": q,
        "cu_seqlens_q": torch.arange(4),
        "max_seqlen_q": 1,
        "seqused_k": torch.ones(3),
        "max_seqlen_k": 9,
        "block_table": torch.zeros(3, 1),
        "softmax_scale": 0.5,
        "causal": True,
        "window_size": None,
        "softcap": 0,
        "alibi_slopes": None,
        "s_aux": None,
        "scheduler_metadata": "schedule",
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "certified", "expected"),
    [
        ({}, True, "bundled"),
        ({"window_size": [-1, -1]}, True, "bundled"),
        ({}, False, ("flash", 128, None)),
        ({"max_seqlen_q": 5}, True, ("flash", 5, "schedule")),
        ({"max_seqlen_q": 5, "head": 128}, True, "bundled"),
        ({"max_seqlen_q": 5, "head": 128}, False, ("flash", 5, "schedule")),
        ({"max_seqlen_q": 5, "head": 128, "k": torch.zeros(4, 16, 3, 128)}, True, ("flash", 5, "schedule")),
        ({"max_seqlen_q": 18, "head": 128}, True, ("flash", 18, "schedule")),
        ({"softcap": 30.0}, True, ("flash", 128, None)),
        ({"causal": False}, True, ("flash", 128, None)),
        ({"s_aux": torch.ones(8)}, True, ("flash", 128, None)),
        ({"k": torch.zeros(4, 8, 2, 64)}, True, ("flash", 128, None)),
        ({"window_size": [511, 0]}, True, ("flash", 128, None)),
        ({"head": 128, "softcap": 30.0}, True, ("flash", 1, "schedule")),
    ],
)
def test_single_queries_take_the_certified_kernel_and_nothing_else_does(changes, certified, expected, monkeypatch):
    from bi_patch.ops.cuda import attention
    from bi_patch.seams.cuda import attention as attention_cuda

    given = flash_call(**changes)
    took = []
    monkeypatch.setitem(attention._certified, attention_cuda._problem(given["q"], given["k"]), certified)
    monkeypatch.setattr(attention, "attend", lambda *told: took.append("bundled") or told[-1] == given["max_seqlen_k"])
    monkeypatch.setattr(attention.machine, "processors", lambda: 8)  # three tokens with two key heads are few
    attention_cuda._decode_or(lambda **a: took.append(("flash", a["max_seqlen_q"], a["scheduler_metadata"])))(**given)
    assert took == [expected]


class Triton:
    """A fake of vLLM's kernel for top-k and top-p, which the seam calls. It records its arguments."""

    def __init__(self):
        self.calls = []

    def apply_top_k_top_p_triton(self, logits, k, p, **told):
        assert logits.stride() == (logits.shape[1], 1)
        rows = [None if given is None else len(given) for given in (k, p)]
        self.calls.append((len(logits), *rows, told))
        return logits.fill_(-1)


@pytest.mark.parametrize("mode, expected", [("processed_logprobs", torch.float32), ("raw_logprobs", torch.bfloat16)])
@pytest.mark.parametrize("processed", [False, True])
def test_processed_logprobs_have_one_type_whatever_others_ask_for(mode, expected, processed):
    """The seam converts rows to fp32 only if vLLM sums them afterwards. fp32 rows stay as they are."""
    apply = _closed("sampling.cuda_processed_logprobs", lambda self, x, **_: x.float() if processed else x)
    logits = torch.randn(1, 8, dtype=torch.bfloat16).as_strided((1, 6), (8, 1))
    got = apply(SimpleNamespace(logprobs_mode=mode), logits, pos=None)
    assert got.dtype == (torch.float32 if processed else expected) and torch.equal(got, logits.to(got.dtype))
    assert mode != "processed_logprobs" or got.stride() == (6, 1)


def before_033(logits, k, p):
    """The signature of vLLM's function up to 0.32."""


def since_033(logits, k, p, has_topp_only_rows=True):
    """The signature of vLLM's function from 0.33 on."""


@pytest.mark.parametrize("rows", [1, 64, 65, 200])
@pytest.mark.parametrize(
    "original,k,p,told",
    [
        (before_033, True, False, {}),
        (before_033, False, True, {}),
        (before_033, True, True, {}),
        (since_033, True, False, {}),
        (since_033, False, True, {}),
        (since_033, True, True, {}),
        (since_033, True, True, {"has_topp_only_rows": False}),
    ],
)
def test_top_p_alone_goes_in_pieces_and_the_rest_in_one_call(monkeypatch, rows, original, k, p, told):
    from bi_patch.seams.cuda import sampling

    kernel = Triton()
    monkeypatch.setitem(sys.modules, "vllm.v1.sample.ops.topk_topp_triton", kernel)
    apply = sampling._top_k_top_p(original)
    logits = torch.zeros(rows, 56)[:, :51]  # a padded vocabulary
    given = [torch.ones(rows) if wanted else None for wanted in (k, p)]
    out = apply(logits, *given, **told)
    pieces = [rows] if not p or told else [64] * (rows // 64) + ([rows % 64] if rows % 64 else [])
    flag = {"has_topp_only_rows": False} if original is since_033 and (told or not p) else {}
    assert kernel.calls == [(n, n, n, flag) for n in pieces]  # a row's kernel does not depend on the others' limits
    assert out.shape == (rows, 51) and bool((out == -1).all())
    assert apply(logits, None, None) is logits


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
@pytest.mark.parametrize("vocab", [51, 56])
def test_rows_of_logits_are_packed(rows, vocab):
    from bi_patch.seams.cuda import sampling

    held = torch.randn(rows, 56)
    found = sampling.packed_logits(lambda self, x: x[..., :vocab])(None, held)
    assert found.stride() == (vocab, 1) and torch.equal(found, held[:, :vocab])
    assert found.data_ptr() == held.data_ptr() or vocab != 56 or not rows
    assert sampling.packed_logits(lambda self, x: x)(None, None) is None


@pytest.mark.parametrize("release", [release for release in RELEASES if Version(release) < Version("0.33")])
def test_gates_before_vllm_0_33_keep_one_kernel(release):
    from bi_patch.seams.cuda import moe

    class Gate:
        def __init__(self, size):
            self.size = size
            self.allow_specialized_router_gemm = self.allow_ll_bf16_gemm = self.allow_cublas_router_gemm = True

    Gate.__init__ = moe._gate(Gate.__init__)
    gate = Gate(3)
    turned_on = {name for name, value in vars(gate).items() if name.startswith("allow") and value}
    assert gate.size == 3 and turned_on == {"allow_cublas_router_gemm"}
    assert "moe.cuda_gate" in {p.seam.name for p in plan(Version(release), "cuda").seams}
    assert "moe.cuda_gate" not in {p.seam.name for p in plan(Version("0.33.0"), "cuda").seams}


def test_grouped_routing_is_not_compiled_apart():
    @torch.compile(dynamic=True)
    def grouped_topk(x):
        assert not torch.compiler.is_compiling()
        return x

    assert _closed("moe.cuda_grouped_topk", grouped_topk)("as given") == "as given"
    plain = inspect.unwrap(grouped_topk)  # torch.compile returns this function if TORCHDYNAMO_DISABLE is set
    assert _closed("moe.cuda_grouped_topk", plain) is plain


def test_combined_kernels_are_not_timed():
    """Inductor's deterministic mode stops where vLLM 0.26 times combined kernels (GLM-4.5, compiled)."""
    held = config(compilation__inductor_compile_config={"combo_kernels": True, "benchmark_combo_kernel": True})
    for policy in cuda_policies():
        policy.apply(held)
    assert held.compilation_config.inductor_compile_config == {"combo_kernels": True, "benchmark_combo_kernel": False}


@pytest.mark.parametrize("option", [{"deterministic": False}, {"max_autotune": True}, {"coordinate_descent_tuning": 1}])
def test_options_that_let_inductor_choose_by_time_are_refused(option):
    """Arming sets TORCHINDUCTOR_DETERMINISTIC, and an option of vLLM's would take it back."""
    from bi_patch.seams import graphs

    own = {"combo_kernels": False, "size_asserts": True, "post_grad_custom_post_pass": print}
    graphs.check_inductor(config(compilation__inductor_compile_config=own))
    with pytest.raises(UnsupportedFeature, match=f"compilation.inductor: .*{next(iter(option))}"):
        graphs.check_inductor(config(compilation__inductor_compile_config=own | option))
