"""MLA's patch points: what they refuse by name, and what they hand to the kernels."""

import functools
import sys
from types import SimpleNamespace

import pytest
import torch

from bi_patch.arming.catalog import CATALOG
from bi_patch.errors import UnsupportedFeature
from bi_patch.ops.cpu import latent
from bi_patch.seams import active


def closed(name, original):
    return next(seam for seam in CATALOG.seams if seam.name == name).close(original)


def layer(**changes):
    held = {
        "attn_backend": SimpleNamespace(get_name=lambda: "FLASH_ATTN_MLA"),
        "use_sparse": False,
        "indexer": None,
        "sliding_window": None,
        "non_causal_multi_token_decode": False,
        "kv_cache_dtype": "auto",
        "use_pcp": False,
        "impl": SimpleNamespace(dcp_world_size=1),
        "dcp_q_replicate": False,
        "head_size": 576,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    return SimpleNamespace(**(held | changes))


def named(backend):
    return {"attn_backend": SimpleNamespace(get_name=lambda: backend)}


QUERIES = SimpleNamespace(attention_config=SimpleNamespace(use_prefill_query_quantization=True))
REFUSED = [
    ({"use_sparse": True}, "sparse attention"),
    ({"sliding_window": 128}, "a sliding window"),
    ({"kv_cache_dtype": "fp8"}, "a fp8 KV cache"),
    ({"impl": SimpleNamespace(dcp_world_size=2)}, "context parallelism"),
    ({"non_causal_multi_token_decode": True}, "attention to later tokens"),
]


@pytest.mark.parametrize(("change", "said"), [*REFUSED, ({"head_size": 320}, "latents of 320")])
def test_options_without_a_kernel_are_refused_on_cpu(change, said):
    made = closed("mla.cpu_init", lambda self: None)
    made(layer())
    with pytest.raises(UnsupportedFeature, match=f"mla.cpu: .*{said}.*BI_PATCH=0"):
        made(layer(**change))


@pytest.mark.parametrize("weight", [torch.zeros(8, 512, dtype=torch.int8), torch.zeros(7, 512)])
def test_an_up_projection_that_is_quantized_or_of_another_size_is_refused(weight):
    pack = closed("mla.cpu_weights", lambda self, act_dtype: None)
    made = SimpleNamespace(
        kv_b_proj=SimpleNamespace(weight=weight),
        num_heads=2,
        qk_nope_head_dim=2,
        v_head_dim=2,
        kv_lora_rank=512,
        quant_config=None,
        layer_name="model.layers.0.attn",
    )
    with pytest.raises(UnsupportedFeature, match="mla.cpu: the up-projection of model.layers.0.attn"):
        pack(made, torch.float32)


def test_new_weights_are_packed_in_place(cache, monkeypatch):
    """Compiled code and running requests hold no old copy: the packed weights stay where they are."""
    from bi_patch.ops.cpu import machine
    from bi_patch.seams.cpu import mla

    monkeypatch.setattr(
        "vllm.model_executor.layers.attention.mla_attention.set_default_quant_scales",
        lambda layer, register_buffer: None,
    )
    machine.load_kernels(cache)
    pack = closed("mla.cpu_weights", lambda self, act_dtype: None)
    projection = SimpleNamespace(weight=torch.randn(2 * (16 + 16), 512))
    made = torch.nn.Module()
    vars(made).update(
        kv_b_proj=projection,
        num_heads=2,
        qk_nope_head_dim=16,
        v_head_dim=16,
        kv_lora_rank=512,
        quant_config=None,
        layer_name="attn",
    )
    made.process_weights_after_loading = lambda dtype: pack(made, dtype)
    made.process_weights_after_loading(torch.float32)
    held = made.bi_patch_absorbed
    places = held.key.data_ptr(), held.value.data_ptr()
    projection.weight.copy_(torch.randn(2 * (16 + 16), 512))
    mla.absorb_again(torch.nn.ModuleList([made]))
    fresh = latent.absorb(projection.weight, 2, 16, 16)
    assert made.bi_patch_absorbed is held and places == (held.key.data_ptr(), held.value.data_ptr())
    assert torch.equal(held.key, fresh.key) and torch.equal(held.value, fresh.value)


@pytest.mark.parametrize("name", ["mla.cpu_build", "mla.cpu_build_amx"])
def test_a_step_is_described_as_it_comes(name):
    build = closed(name, None)
    common = SimpleNamespace(
        causal=True,
        num_reqs=2,
        max_query_len=5,
        max_seq_len=9,
        num_actual_tokens=6,
        query_start_loc="starts",
        slot_mapping="slots",
        seq_lens="lengths",
        block_table_tensor="table",
    )
    builder = SimpleNamespace(metadata_cls=SimpleNamespace, model_config=SimpleNamespace(get_head_size=lambda: 576))
    made = build(builder, 0, common)
    assert (made.seq_lens, made.block_table, made.query_start_loc) == ("lengths", "table", "starts")
    assert made.prefill is None and made.decode is None and made.num_actual_tokens == 6
    common.causal = False
    with pytest.raises(UnsupportedFeature, match="only causal MLA"):
        build(builder, 0, common)


def test_quantized_outputs_are_refused():
    forward = closed("mla.cpu_forward", None)
    out = torch.ones(2, 4)
    assert not forward(None, None, None, None, None, None, out).any(), "a warm-up gives zeros"
    with pytest.raises(UnsupportedFeature, match="quantized outputs"):
        forward(None, None, None, None, None, object(), out, torch.ones(1))
    with pytest.raises(UnsupportedFeature, match="replicated queries"):
        forward(None, None, None, None, None, object(), out, q_dcp_replicated=out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(entry for entry in REFUSED if "kv_cache_dtype" not in entry[0]),
        (named("FLASHMLA"), "the FLASHMLA backend. Use --attention-backend FLASH_ATTN_MLA"),
        (named("TRITON_MLA"), "the TRITON_MLA backend. Use --attention-backend FLASH_ATTN_MLA"),
        ({"kv_cache_dtype": "fp8"}, "the FLASH_ATTN_MLA backend of a fp8 KV cache. Use --attention-backend TRITON_MLA"),
        ({"kv_lora_rank": 256, "qk_rope_head_dim": 32}, r"latents of 256 \+ 32 elements"),
        ({"v_head_dim": 64}, "heads of 192 elements with values of 64"),
        ({"qk_nope_head_dim": 192}, "heads of 256 elements with values of 128"),
        (named("FLASHMLA") | {"kv_cache_dtype": "fp8"}, "the FLASHMLA backend of a fp8 KV cache"),
        (named("TRITON_MLA") | {"kv_cache_dtype": "fp8_e5m2"}, "a fp8_e5m2 KV cache"),
        (named("TRITON_MLA") | {"kv_cache_dtype": "fp8", "_vllm_config": QUERIES}, "8-bit queries of prompts"),
    ],
)
def test_options_without_a_certificate_are_refused_on_cuda(change, said, monkeypatch):
    monkeypatch.setattr(active, "mla", "two")
    made = closed("mla.cuda_backend", lambda self: None)
    made(layer())
    with pytest.raises(UnsupportedFeature, match=f"mla.cuda: .*{said}.*BI_PATCH=0"):
        made(layer(**change))


@pytest.mark.parametrize(("nope", "value"), [(128, 128), (192, 256), (64, 128)])
def test_head_layouts_with_a_kernel(nope, value, monkeypatch):
    for form in ("two", "one"):
        monkeypatch.setattr(active, "mla", form)
        closed("mla.cuda_backend", lambda self: None)(layer(qk_nope_head_dim=nope, v_head_dim=value))


def test_an_fp8_cache_is_served_in_two_forms_only(monkeypatch):
    made = closed("mla.cuda_backend", lambda self: None)
    monkeypatch.setattr(active, "mla", "two")
    made(layer(**named("TRITON_MLA"), kv_cache_dtype="fp8"))
    monkeypatch.setattr(active, "mla", "one")
    with pytest.raises(UnsupportedFeature, match="mla.cuda: .*a fp8 KV cache in one form"):
        made(layer(**named("TRITON_MLA"), kv_cache_dtype="fp8"))


@pytest.mark.parametrize(
    ("dtype", "chosen", "taken"), [("fp8", False, "TRITON_MLA"), ("fp8", True, None), ("auto", False, None)]
)
def test_an_fp8_cache_takes_the_backend_that_reads_it(dtype, chosen, taken, monkeypatch):
    """And the prefix cache stays on, which upstream's mode turns off beside this backend."""
    from bi_patch.seams.cuda import mla

    monkeypatch.setattr(active, "mla", "two")
    monkeypatch.setattr(mla, "_chosen", lambda: chosen)
    monkeypatch.setattr(mla, "_triton", lambda: "TRITON_MLA")
    seen = []

    def original(self, cache_config=None, attn_backend=None):
        seen.append(attn_backend)
        cache_config.enable_prefix_caching = False

    cache = SimpleNamespace(cache_dtype=dtype, enable_prefix_caching=True)
    monkeypatch.setattr(mla, "_refuse", lambda layer: None)
    closed("mla.cuda_backend", original)(layer(), cache_config=cache)
    assert seen == [taken] and cache.enable_prefix_caching


@pytest.mark.parametrize(("form", "kept"), [("two", 1), ("one", 128)])
def test_single_rows_of_an_fp8_cache_are_sequences_of_their_own(form, kept, monkeypatch):
    monkeypatch.setattr(active, "mla", form)
    builder = SimpleNamespace(reorder_batch_threshold=128)
    closed("mla.cuda_eighths", lambda self: None)(builder)
    assert builder.reorder_batch_threshold == kept and hasattr(builder, "bi_patch_rows") == (form == "two")


def test_long_steps_of_an_fp8_cache_are_computed_in_pieces(monkeypatch):
    """Each piece writes its own rows, by its own keys."""
    from bi_patch.kernels.triton import heads as products
    from bi_patch.seams.cuda import mla_eighths
    from bi_patch.seams.cuda.chunks import Metadata

    monkeypatch.setattr(products, "product", lambda a, b, out: out.copy_(a @ b))
    monkeypatch.setattr(mla_eighths, "most_rows", lambda heads, latent: 3)
    monkeypatch.setattr(
        mla_eighths,
        "attend",
        lambda layer, q, cache, table, lengths: q[..., :4] * lengths[:, None, None] + table[:, :1, None],
    )
    held = SimpleNamespace(
        kv_lora_rank=4, qk_nope_head_dim=5, qk_rope_head_dim=2, v_head_dim=3, W_UK_T=torch.randn(2, 5, 4),
        W_UV=torch.randn(2, 4, 3),
    )  # fmt: skip
    q, lengths = torch.randn(8, 2, 7), torch.arange(8, dtype=torch.int32)
    table = torch.arange(8, dtype=torch.int32)[:, None] * 10
    out = torch.zeros(8, 6)
    mla_eighths.generate(held, q, None, Metadata(decode=mla_eighths.Rows().make(table, lengths, 8)), out)
    low = torch.einsum("rhp,hpl->rhl", q[..., :5], held.W_UK_T) * lengths[:, None, None] + table[:, :1, None]
    torch.testing.assert_close(out, torch.einsum("rhl,hlv->rhv", low, held.W_UV).flatten(1))
    assert mla_eighths.most_rows(128, 512) == 3 and [mla_eighths.parts(heads) for heads in (16, 32, 128)] == [16, 16, 8]


def test_every_step_takes_one_form_one_tile_and_one_split(monkeypatch):
    monkeypatch.setattr(active, "mla", "one")
    builder = SimpleNamespace(reorder_batch_threshold=512)
    closed("mla.cuda_rows", lambda self: None)(builder)
    assert builder.reorder_batch_threshold > 1 << 20
    for longest in (1, 127, 128, 4000):
        made = closed("mla.cuda_query", lambda self, longest: SimpleNamespace(max_query_len=longest))(builder, longest)
        schedule = closed("mla.cuda_schedule", lambda self, **given: given)
        given = schedule(builder, max_query_len=longest, max_num_splits=0, causal=True)
        assert made.max_query_len == given["max_query_len"] == max(longest, 128)
        assert given["max_num_splits"] == 1 and given["causal"]


def test_the_special_kernel_of_the_low_rank_projection_is_off():
    made = SimpleNamespace(_use_min_latency_gemm=True)
    closed("mla.cuda_projection", lambda self: None)(made)
    assert not made._use_min_latency_gemm


def test_the_certificate_computes_rows_of_a_prompt_in_any_cut(monkeypatch):
    """By a layer that reads the cache as FlashAttention-MLA does; a layer that depends on its step is seen."""
    from bi_patch.ops.certificates import Key
    from bi_patch.ops.cuda import attention_layers, chunks
    from bi_patch.seams.cuda import mla_samples

    monkeypatch.setattr(active, "mla", "one")
    module = "vllm.v1.attention.backends.fa_utils"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(get_flash_attn_version=lambda: None))
    parent = sys.modules.get("vllm.v1.attention.backends")
    if parent is not None:
        monkeypatch.setattr(parent, "fa_utils", sys.modules[module], raising=False)
    monkeypatch.setattr(attention_layers, "_TOKENS", 100)
    ways = [("single rows", [(3, 1), (40, 1)]), ("chunks of 40", [(0, 40), (40, 40), (80, 20)]), ("alone", [(99, 1)])]
    monkeypatch.setattr(chunks, "steps", lambda tokens: iter(ways))

    def attend(faulty):
        def forward_mqa(q, cache, metadata, layer):
            step, rows = metadata.decode, []
            starts, lengths = step.query_start_loc.tolist(), step.seq_lens.tolist()
            assert step.max_query_len >= 128 and step.max_num_splits == 1
            for number, length in enumerate(lengths):
                latents = cache[step.block_table[number].long()].flatten(0, 1)
                for row in range(starts[number], starts[number + 1]):
                    seen = latents[: length - starts[number + 1] + row + 1]
                    scores = torch.cat(q, -1)[row] @ seen.T
                    found = scores.softmax(-1) @ seen[:, :4]
                    rows.append(found + 1e-9 * len(lengths) * faulty)
            return torch.stack(rows), None

        return SimpleNamespace(kv_lora_rank=4, impl=SimpleNamespace(forward_mqa=forward_mqa))

    problem = chunks.Problem("FLASH_ATTN_MLA", 2, 1, 6, 0, 16, torch.float64)
    for faulty in (False, True):
        prepare = functools.partial(mla_samples.prepare, attend(faulty), 16)
        made = chunks._certify(problem, prepare, Key("", "", "", "", ""), "cpu")
        assert made.passed == (not faulty), made
