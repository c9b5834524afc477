"""Adapters: one number, one adapter; the hash of cached blocks; new weights beside LoRA."""

from types import SimpleNamespace

import pytest

from bi_patch.errors import UnsupportedFeature, UnsupportedRequest
from bi_patch.platforms.features.pairs import PAIRS
from bi_patch.seams import adapter_files, adapters, weights
from bi_patch.seams.common import arriving, lora
from bi_patch.seams.cpu import lora as on_cpu
from bi_patch.seams.cuda import expert_lora
from bi_patch.seams.cuda import lora as on_cuda

torch = pytest.importorskip("torch")


def adapter(number, name="one", path="/one"):
    return SimpleNamespace(lora_int_id=number, lora_name=name, lora_path=path)


def core(*running, head=torch.bfloat16):
    requests = {str(i): SimpleNamespace(lora_request=held) for i, held in enumerate(running)}
    model = SimpleNamespace(dtype=torch.bfloat16, head_dtype=head)
    config = SimpleNamespace(model_config=model)
    return SimpleNamespace(scheduler=SimpleNamespace(requests=requests), vllm_config=config)


def test_a_number_stands_for_one_adapter():
    held = core()
    lora.check(held, None)
    lora.check(held, adapter(1))
    lora.check(held, adapter(1))
    lora.check(held, adapter(2, "two", "/two"))
    for other in (adapter(1, "two", "/one"), adapter(1, "one", "/two")):
        with pytest.raises(UnsupportedRequest, match="lora_int_id 1 is the adapter 'one' of /one"):
            lora.check(held, other)


def test_a_name_stands_for_one_running_adapter():
    with pytest.raises(UnsupportedRequest, match="another adapter that is named 'one'"):
        lora.check(core(None, adapter(1)), adapter(2))
    lora.check(core(None, adapter(1, "two")), adapter(2))
    lora.check(core(adapter(2)), adapter(2))


def test_a_name_stands_for_one_adapter_also_among_requests_on_their_way():
    """The scheduler gets requests in another thread than the one that checks them."""
    held, one = core(), SimpleNamespace(lora_request=adapter(1))
    arriving.note(held, one)
    with pytest.raises(UnsupportedRequest, match="another adapter that is named 'one'"):
        lora.check(held, adapter(2))
    arriving.arrived(held, one)
    lora.check(held, adapter(3))


@pytest.fixture
def folder(tmp_path):
    """write(names, value=1.0): the path of an adapter with tensors of these names."""
    save_file = pytest.importorskip("safetensors.torch").save_file

    def write(*names, value=1.0):
        save_file({name: torch.full((2, 2), value) for name in names}, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text("{}")
        return str(tmp_path)

    return write


def test_files_that_changed_are_refused_before_a_step(folder):
    held, path = core(), folder("q_proj")
    lora.check(held, adapter(1, path=path))
    folder("q_proj")  # written again, with the same weights
    lora.check(held, adapter(1, path=path))
    folder("q_proj", value=2.0)
    for _ in range(2):
        with pytest.raises(UnsupportedRequest, match="lora.load: .* holds other weights than when adapter 1"):
            lora.check(held, adapter(1, path=path))
    lora.check(held, adapter(2, "two", path))
    folder("q_proj")
    lora.check(held, adapter(1, path=path))


def test_a_hub_is_asked_once(monkeypatch, tmp_path):
    from vllm.lora import utils

    asked = []
    monkeypatch.setattr(utils, "get_adapter_absolute_path", lambda path: asked.append(path) or str(tmp_path / path[4:]))
    monkeypatch.setattr(adapter_files, "_folders", {})
    assert adapter_files.folder("hub/one") is None and adapter_files.folder("hub/one") is None
    (tmp_path / "one").mkdir()
    assert [adapter_files.folder("hub/one") for _ in range(3)] == [tmp_path / "one"] * 3
    assert asked == ["hub/one"] * 3


def test_an_adapter_of_a_head_in_another_type_is_refused_before_a_step(folder):
    plain, wide = core(), core(head=torch.float32)
    head, other = "base_model.model.lm_head.lora_A.weight", "base_model.model.model.layers.0.q_proj.lora_A.weight"
    lora.check(plain, adapter(1, path=folder(head, other)))
    with pytest.raises(UnsupportedRequest, match="lora.head: .* adapters of a head in torch.float32"):
        lora.check(wide, adapter(1, path=folder(head, other)))
    path = folder(other)
    lora.check(wide, adapter(2, "two", path))
    adapter_files.Path(path, "adapter_model.safetensors").rename(adapter_files.Path(path, "adapter_model.bin"))
    with pytest.raises(UnsupportedRequest, match="lora.head"):  # nobody reads names from such a file
        lora.check(wide, adapter(3, "three", path))


def test_adding_an_adapter_is_checked():
    held, added = core(), []
    add = lora._add(lambda self, request: added.append(request))
    add(held, adapter(1))
    with pytest.raises(UnsupportedRequest):
        add(held, adapter(1, "other"))
    assert len(added) == 1


def test_a_blocks_hash_holds_the_number():
    keys = lora._keys(lambda request: [("lora", "one", "/one")] if request.lora_request else [])
    assert keys(SimpleNamespace(lora_request=None)) == []
    found = [keys(SimpleNamespace(lora_request=adapter(number))) for number in (1, 2)]
    assert found[0] != found[1] and found[0][0] == found[1][0]


def test_an_adapter_is_read_again_with_the_weights_that_it_had():
    def model(value, scaling=1.0):
        pair = SimpleNamespace(lora_a=torch.full((2, 3), value), lora_b=[torch.ones(4, 2), None], scaling=scaling)
        return SimpleNamespace(loras={"layer": pair})

    given = []
    load = lora._load(lambda self, request: given[-1])
    manager = SimpleNamespace()
    for made in (model(1.0), model(1.0)):
        given.append(made)
        assert load(manager, adapter(1)) is made
    for made in (model(2.0), model(1.0, 2.0)):
        given.append(made)
        with pytest.raises(UnsupportedFeature, match="holds other weights than when adapter 1"):
            load(manager, adapter(1))
        load(SimpleNamespace(), adapter(1))  # another engine
    assert load(manager, adapter(3)) is given[-1]


def test_new_weights_beside_lora_are_refused():
    weights.refuse_with_lora(SimpleNamespace(lora_config=None))
    with pytest.raises(UnsupportedFeature, match="weights.lora"):
        weights.refuse_with_lora(SimpleNamespace(lora_config=object()))


def config(**given):
    model = dict(
        runner_type="generate",
        is_multimodal_model=False,
        multimodal_config=None,
        is_encoder_decoder=False,
        use_mla=False,
        is_hybrid=False,
        is_moe=False,
        enable_prompt_embeds=False,
        quantization=None,
        dtype=torch.bfloat16,
    )
    asked = dict(target_modules=None, fully_sharded_loras=False, lora_dtype=torch.bfloat16)
    whole = dict(speculative_config=None, kv_transfer_config=None, parallel_config=SimpleNamespace())
    for part in (model, asked, whole):
        part.update({name: given.pop(name) for name in list(given) if name in part})
    assert not given
    return SimpleNamespace(lora_config=SimpleNamespace(**asked), model_config=SimpleNamespace(**model), **whole)


def beside(given) -> str:
    """What the table's pairs say of a configuration."""
    return " ".join(pair.asked(given) for pair in PAIRS)


def test_what_is_covered_with_lora():
    assert not beside(config()).strip()
    assert not beside(config(lora_dtype="auto")).strip()


@pytest.mark.parametrize(
    "given,said",
    [
        (dict(is_moe=True), "experts"),
        (dict(enable_prompt_embeds=True), "prompt embeddings"),
        (dict(is_moe=True, target_modules=["q_proj"]), "experts"),
        (dict(runner_type="pooling"), "pooling"),
        (
            dict(is_multimodal_model=True, multimodal_config=SimpleNamespace(language_model_only=True)),
            "multimodal models as text models",
        ),
        (dict(is_encoder_decoder=True), "encoder-decoder"),
        (dict(use_mla=True), "MLA"),
        (dict(is_hybrid=True), "recurrent"),
        (dict(quantization="fp8"), "quantized"),
        (dict(speculative_config=object()), "speculative"),
        (dict(kv_transfer_config=object()), "KV transfer"),
        (dict(fully_sharded_loras=True), "sharded"),
        (dict(lora_dtype=torch.float16), "another type"),
        (dict(parallel_config=SimpleNamespace(tensor_parallel_size=2)), "tensor parallelism"),
        (dict(parallel_config=SimpleNamespace(pipeline_parallel_size=2)), "pipeline parallelism"),
        (dict(parallel_config=SimpleNamespace(data_parallel_size=2)), "data parallelism"),
    ],
)
def test_what_is_refused_with_lora(given, said):
    assert said in beside(config(**given))


class Wrapper:
    def __init__(self, tokens, requests=()):
        self.token_lora_indices, self.sampler_indices = torch.tensor(tokens), torch.tensor(requests)


def of(made):
    return SimpleNamespace(lora_manager=SimpleNamespace(punica_wrapper_mapping={"": made}))


def test_the_head_takes_the_adapter_of_each_rows_token():
    made, hidden = Wrapper([2, 2, 2, -1, 0, 0]), torch.randn(8, 4)
    with adapters.step(of(made), hidden, torch.tensor([2, 3, 4, 5])):
        sampled = hidden[torch.tensor([2, 3, 4, 5])]
        assert adapters.slots(made, sampled, "cuda").tolist() == [2, -1, 0, 0]  # drafts: two rows of one request
        assert adapters.slots(made, hidden[1:5], "cuda").tolist() == [2, 2, -1, 0]  # a part of prompts
        for unknown in (hidden[3:8], hidden[1:3].clone(), hidden[::2]):
            with pytest.raises(UnsupportedFeature, match="lora.cuda: the head gets"):
                adapters.slots(made, unknown, "cuda")
    made.sampler_indices = torch.tensor([2, -1])
    assert adapters.slots(made, hidden[:2], "cpu").tolist() == [2, -1]
    with pytest.raises(UnsupportedFeature, match="lora.cpu: the head gets 3 rows"):
        adapters.slots(made, hidden[:3], "cpu")


def test_model_runners_tell_the_head_its_rows():
    made, hidden = Wrapper([1, 0]), torch.randn(2, 4)
    batch = SimpleNamespace(logits_indices=torch.tensor([1]))
    runner = SimpleNamespace(
        model=of(made),
        lora_config=object(),
        num_prompt_logprobs={"a": 1},
        execute_model_state=SimpleNamespace(hidden_states=hidden, input_batch=batch),
    )
    sample = adapters.sample_tokens(lambda self, grammar: adapters.slots(made, hidden[batch.logits_indices], "cuda"))
    assert sample(runner, None).tolist() == [0]
    scored = adapters.prompt_logprobs(lambda self, given: adapters.slots(made, given[:1], "cpu"))
    assert scored(runner, hidden).tolist() == [1]
    runner.execute_model_state = None
    assert adapters.sample_tokens(lambda self, grammar: None)(runner, None) is None


def head(slots=3, kind=None):
    return SimpleNamespace(
        base_layer=SimpleNamespace(head_dtype=kind), lora_b_stacked=torch.zeros(slots, 1, 8, 4, dtype=torch.bfloat16)
    )


def test_only_adapters_with_a_part_for_the_head_change_logits(monkeypatch):
    from bi_patch.ops.cuda import lora as op

    layer, added = head(), []
    reset = on_cuda._reset_head(lambda self, index: None)
    put = on_cuda._set_head(lambda self, index, a, b: reset(self, index))
    add = on_cuda._logits(lambda *given: pytest.fail("vLLM's own product"))
    made = Wrapper([], [0, 2])
    monkeypatch.setattr(op, "add_rows", lambda y, x, a, b, slots, table: added.append((slots.tolist(), table.tolist())))

    def run():
        add(made, torch.zeros(2, 8), torch.zeros(2, 4), None, layer.lora_b_stacked, 1.0)
        return added.pop() if added else None

    zeros, weights = torch.zeros(8, 4), torch.ones(8, 4)
    assert run() is None
    put(layer, 1, None, zeros)
    assert run() is None
    put(layer, 2, None, weights)
    assert run() == ([0, 2], [-1, -1, 2])
    put(layer, 0, None, weights)
    assert run() == ([0, 2], [0, -1, 2])
    reset(layer, 2)
    put(layer, 0, None, zeros)
    assert run() is None
    with pytest.raises(UnsupportedFeature, match="a head in torch.float32"):
        put(head(kind=torch.float32), 0, None, weights)


def test_a_head_of_another_type_takes_no_adapter_on_cpu():
    put = on_cpu._set_head(lambda self, index, a, b: index)
    assert put(head(), 1, None, torch.ones(8, 4)) == 1
    wide = head(kind=torch.float32)
    assert put(wide, 1, None, torch.zeros(8, 4)) == 1
    with pytest.raises(UnsupportedFeature, match="lora.cpu: .* a head in torch.float32"):
        put(wide, 1, None, torch.ones(8, 4))
    y = torch.zeros(2, 8)
    on_cpu._logits(None)(None, y, torch.zeros(2, 4).bfloat16(), None, wide.lora_b_stacked, 1.0)
    assert not y.any()


class TritonExperts(SimpleNamespace):
    pass


def of_experts(kernel=TritonExperts, **given):
    config = dict(activation=SimpleNamespace(value="silu"), is_act_and_mul=True, has_bias=False, swiglu_limit=None)
    held = dict(quant_dtype=None, weight_quant_dtype=None, w1_bias=None)
    layer = dict(tp_size=1, use_ep=False, _shared_experts=None, _lora_stream=None)
    asked = dict.fromkeys(("enable_moe_shared_loras", "enable_mixed_moe_lora_format", "fully_sharded_loras"), False)
    routed = dict(apply_router_weight_on_input=False)
    for part in (config, held, layer, asked, routed):
        part.update({name: given.pop(name) for name in list(given) if name in part})
    assert not given
    experts = kernel(quant_config=SimpleNamespace(**held))
    base = SimpleNamespace(routed_experts=SimpleNamespace(**routed))
    kernel = SimpleNamespace(fused_experts=experts)
    made = SimpleNamespace(moe_config=SimpleNamespace(**config), _moe_kernel=kernel, base_layer=base, **layer)
    return made, SimpleNamespace(**asked)


@pytest.mark.parametrize(
    "given,said",
    [
        (dict(kernel=SimpleNamespace), "another kernel than vLLM's Triton experts"),
        (dict(activation=SimpleNamespace(value="swigluoai")), "the activation swigluoai"),
        (dict(is_act_and_mul=False), "the activation"),
        (dict(has_bias=True), "a bias"),
        (dict(swiglu_limit=7.0), "a limit of the activation"),
        (dict(weight_quant_dtype="fp8"), "quantized weights"),
        (dict(quant_dtype="fp8"), "quantized weights"),
        (dict(tp_size=2), "several ranks"),
        (dict(use_ep=True), "several ranks"),
        (dict(_shared_experts=object()), "shared experts"),
        (dict(_lora_stream=object()), "a stream of their own"),
        (dict(enable_moe_shared_loras=True), "a factor shared by all experts"),
        (dict(enable_mixed_moe_lora_format=True), "checkpoints of two layouts"),
        (dict(fully_sharded_loras=True), "sharded adapters"),
        (dict(apply_router_weight_on_input=True), "a router that weights the input"),
    ],
)
def test_experts_that_nobody_examined_are_refused(given, said):
    made = expert_lora._examined(lambda *given: "made")
    assert expert_lora._unexamined(*of_experts()) == ""
    layer, asked = of_experts(**given)
    with pytest.raises(UnsupportedFeature, match=f"expert_lora.cuda: .*{said}"):
        made(layer, 4, asked)


def test_fused_experts_are_refused():
    with pytest.raises(UnsupportedFeature, match="FusedMoE3DWithLoRA"):
        expert_lora._fused(lambda *given: None)(object(), 4, object())


def of_tokens(none=False):
    held, zero = torch.tensor([0, 1]), torch.zeros(1, dtype=torch.int32)
    meta = (held, None, None, None, torch.tensor([-1, 0, 1]), torch.tensor([none]), zero + 3)
    return SimpleNamespace(
        token_mapping_meta=SimpleNamespace(meta_args=lambda tokens, special: meta),
        lora_config=SimpleNamespace(specialize_active_lora=False),
        moe_lora_align_block_size=lambda ids, *sizes, naive_block_assignment: (
            held,
            None if naive_block_assignment else "rows",
            "experts",
            None if naive_block_assignment else "padded",
        ),
    )


def test_both_products_of_experts_get_one_assignment(monkeypatch):
    from bi_patch.ops.cuda import expert_lora as op

    added = []
    monkeypatch.setattr(op, "add", lambda *given: added.append(given))
    first = expert_lora._first(lambda *given: pytest.fail("vLLM's own product"))
    second = expert_lora._second(lambda *given: pytest.fail("vLLM's own product"))
    y, x, ids, weights = torch.zeros(2, 2, 6), torch.zeros(2, 4), torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2)

    def run(made, experts, **given):
        sizes = dict(fully_sharded=False, use_tuned_config=False, top_k=2, max_loras=2, adapter_enabled="enabled")
        found = first(
            made, y, x, "a", "b", ids, weights, None, None, None, 2, 2,
            local_num_experts=experts, num_slices=2, **{**sizes, **given},
        )  # fmt: skip
        second(
            made, y, x, "a", "b", weights, found[0], found[1], found[2], found[3], 2, None, None, 2,
            tp_rank=0, **sizes,
        )  # fmt: skip
        return [(call[4], call[5], call[6], call[-2]) for call in (added.pop(0) for _ in range(len(added)))]

    assert run(of_tokens(none=True), 8) == []
    assert run(of_tokens(), 1) == [("rows", "experts", "padded", None), ("rows", "experts", "padded", weights)]
    assert run(of_tokens(), 8) == [(None, "experts", None, None), (None, "experts", None, weights)]
    for given in (dict(fully_sharded=True), dict(add_inputs=False), dict(token_lora_mapping=ids)):
        with pytest.raises(UnsupportedFeature, match="expert_lora.cuda"):
            run(of_tokens(), 8, **given)


def moe(*names, **given):
    held = config(is_moe=True, **given)
    held.model_config.architectures = list(names)
    return held


def test_which_models_experts_take_adapters():
    assert beside(moe("Qwen3MoeForCausalLM")).strip() == "LoRA with experts"
    for other in (moe("MixtralForCausalLM"), moe("Qwen3MoeForCausalLM", quantization="fp8"), moe()):
        assert "LoRA with experts of other models, or beside another feature" in beside(other)


def test_stacks_of_a_later_engine_at_the_same_addresses():
    from bi_patch.ops.cuda import lora as op

    memory = torch.zeros(4096)
    a, b = memory[:512].view(2, 1, 8, 32), memory[512:1024].view(2, 1, 32, 8)
    of_a, of_b = op._pointers([a], [b], memory.device)
    assert (of_a[1:], of_b[5]) == ((256, 32), 32)
    a, b = memory[:512].view(2, 1, 4, 64), memory[512:1024].view(2, 1, 64, 4)
    of_a, of_b = op._pointers([a], [b], memory.device)
    assert (of_a[1:], of_b[5]) == ((256, 64), 64)
