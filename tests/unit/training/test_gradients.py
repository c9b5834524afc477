"""Gradients in chains: the same bits for every cut into micro-batches, and the gradient that autograd computes."""

import contextlib
import functools

import pytest
import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from bi_patch import training
from bi_patch.errors import BiPatchError, GradientsOpen, GradientsUnordered, UnsupportedFeature
from bi_patch.ops import bits
from bi_patch.tools.parity.batches import LEFT, PACKED, RIGHT, batches

LENGTHS = (5, 33, 3, 17, 600, 2, 9, 21)
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
}


def made(tied=True):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, tie_word_embeddings=tied))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return model.train()


def sequences():
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, SHAPE["vocab_size"], (n,), generator=draw).tolist() for n in LENGTHS]


def gains():
    return torch.randn(len(LENGTHS), generator=torch.Generator().manual_seed(2)).tolist()


def loss(logprobs, places, part, own):
    """The sum of the sequences' own losses, over a count of the whole batch."""
    terms = [
        -gain * logprobs[row, at + 1 : at + len(s)].sum() / sum(LENGTHS)
        for s, gain, (row, at) in zip(part, own, places)
    ]
    return sum(terms)


def gradient(model, cut, layout=RIGHT, checkpointing=False):
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    at = 0
    with training.gradients(model):
        for size in cut:
            part, own = sequences()[at : at + size], gains()[at : at + size]
            (batch,) = batches(part, layout)
            found = training.logprobs(model, batch.ids, batch.mask, batch.positions)
            loss(found, batch.places, part, own).backward()
            at += size
    model.gradient_checkpointing_disable()
    return {name: getattr(p, "main_grad", None) for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_no_cut_changes_a_bit(dtype, tied):
    model = training.arm(made(tied), dtype=dtype)
    whole = gradient(model, [8])
    for cut, layout, checkpointing in (
        ([8], RIGHT, False),
        ([1] * 8, RIGHT, False),
        ([3, 5], LEFT, False),
        ([2, 2, 4], RIGHT, True),
        ([2, 6], PACKED, False),
        ([8], PACKED, True),
    ):
        found = gradient(model, cut, layout, checkpointing)
        wrong = {name: bits.differing(found[name], value) for name, value in whole.items()}
        assert not any(wrong.values()), (cut, layout, checkpointing, wrong)
    assert all(p.grad is p.main_grad and p.main_grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("family", ["Qwen2.5", "Qwen3", "Mistral", "Gemma 2", "Gemma 3"])
def test_no_cut_changes_a_bit_of_any_family(make, family):
    """The lengths hold 4, the number of heads: a norm of heads may not take heads for tokens."""
    model = make(family).train()
    training.arm(model, dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(3)
    given = [torch.randint(3, 250, (1, n), generator=draw) for n in (4, 30, 4, 11)]

    def run(cut):
        at = 0
        with training.gradients(model):
            for size in cut:
                part = given[at : at + size]
                lengths = torch.tensor([0, *(ids.shape[1] for ids in part)]).cumsum(0)
                found = training.logprobs(model, torch.cat(part, 1)[0], cu_seqlens=lengths)
                (found.sum() / 49).backward()
                at += size
        return {name: p.main_grad for name, p in model.named_parameters()}

    whole = run([4])
    for cut in ([1] * 4, [1, 3]):
        found = run(cut)
        assert not any(bits.differing(found[name], value) for name, value in whole.items()), cut
    model.zero_grad()
    for ids in given:
        (training.logprobs(model, ids).sum() / 49).backward()
    for name, p in model.named_parameters():
        assert float((p.grad - whole[name]).norm() / p.grad.norm()) < 1e-3, name


def plain_experts(x, weights, ids, gate_up, down, kind):
    """Stands in for vLLM's kernel, which no unit test loads."""
    first, second = (weight.to(x.dtype) for weight in (gate_up, down))
    rows = []
    for row, share, chosen in zip(x, weights, ids.long()):
        gate, up = (first[chosen] @ row).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        rows.append((share[:, None] * (second[chosen] @ inner[..., None])[..., 0].float()).sum(0).to(x.dtype))
    return torch.stack(rows)


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "router only"])
def test_no_cut_changes_a_bit_of_experts(frozen, monkeypatch):
    monkeypatch.setattr("bi_patch.training.cpu.experts.experts", plain_experts)
    own = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**SHAPE, **own})
    model = AutoModelForCausalLM.from_config(config).train()
    trained = {name for name, p in model.named_parameters() if not frozen or p.dim() < 3}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    training.arm(model, dtype=torch.bfloat16)
    whole = gradient(model, [8])
    assert {name for name, held in whole.items() if held is not None} == trained
    for cut, checkpointing in (([1] * 8, False), ([3, 5], True)):
        found = gradient(model, cut, RIGHT, checkpointing)
        assert not any(bits.differing(found[name], whole[name]) for name in trained)
    if not frozen:
        model.zero_grad()
        (batch,) = batches(sequences(), RIGHT)
        loss(training.logprobs(model, batch.ids, batch.mask), batch.places, sequences(), gains()).backward()
        for name in trained:
            want = dict(model.named_parameters())[name].grad
            torch.testing.assert_close(whole[name], want, rtol=0.02, atol=0.02 * float(want.abs().max()))


def test_the_gradient_is_the_one_of_autograd():
    model = made()
    part = sequences()
    total = 0.0
    for s, gain in zip(part, gains()):
        own = model(torch.tensor([s]), use_cache=False).logits.log_softmax(-1)
        total = total - gain * own[0, :-1].gather(-1, torch.tensor(s[1:])[:, None]).sum() / sum(LENGTHS)
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    training.arm(model)
    found = gradient(model, [3, 5])
    got = torch.cat([found[name].flatten() for name, _ in model.named_parameters()]).double()
    assert float(got @ expected / got.norm() / expected.norm()) > 1 - 1e-10
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-4


def test_a_padding_token_gets_no_gradient():
    first = sequences()[3][5]
    model = made(tied=False)
    plain = gradient(training.arm(model), [3, 5])["model.embed_tokens.weight"]
    training.disarm(model)
    model.model.embed_tokens.padding_idx = first
    found = gradient(training.arm(model), [8])["model.embed_tokens.weight"]
    assert plain[first].any() and not found[first].any()
    rest = torch.arange(len(plain)) != first
    assert not bits.differing(found[rest], plain[rest])


def test_logits_of_the_model_itself_have_such_gradients_too():
    model = training.arm(made(), dtype=torch.bfloat16)
    found = []
    for cut in ([8], [3, 5]):
        at = 0
        with training.gradients(model):
            for size in cut:
                part, own = sequences()[at : at + size], gains()[at : at + size]
                (batch,) = batches(part, RIGHT)
                logits = model(batch.ids, attention_mask=batch.mask).logits
                picked = logits[:, :-1].log_softmax(-1, dtype=torch.float32).gather(-1, batch.ids[:, 1:, None])[..., 0]
                loss(torch.nn.functional.pad(picked, (1, 0)), batch.places, part, own).backward()
                at += size
        found.append({name: p.main_grad for name, p in model.named_parameters()})
    assert not any(bits.differing(found[1][name], value) for name, value in found[0].items())


def test_frozen_weights_get_none_and_a_second_block_begins_anew():
    model = training.arm(made(), dtype=torch.bfloat16)
    first = gradient(model, [8])
    model.model.layers[0].mlp.requires_grad_(False)
    second = gradient(model, [8])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 3
    assert not any(bits.differing(second[name], value) for name, value in first.items() if name not in frozen)
    assert all(model.get_parameter(name).grad is None or name in frozen for name in frozen)


def test_misuse_is_named():
    model = made()
    (batch,) = batches(sequences()[:2], RIGHT)
    with pytest.raises(BiPatchError, match="not armed"):
        with training.gradients(model):
            pass
    training.arm(model, dtype=torch.bfloat16)
    with pytest.raises(GradientsOpen):
        with training.gradients(model), training.gradients(model):
            pass
    with pytest.raises(GradientsUnordered, match="backward pass of each micro-batch"):
        with training.gradients(model):
            both = [training.logprobs(model, batch.ids, batch.mask).sum() for _ in range(2)]
            sum(both).backward()
    with pytest.raises(UnsupportedFeature, match="logits_to_keep"):
        with training.gradients(model):
            model(batch.ids, attention_mask=batch.mask, logits_to_keep=1).logits.sum().backward()
    with training.gradients(model), torch.no_grad():
        training.logprobs(model, batch.ids, batch.mask)
    assert all(p.main_grad is None for p in model.parameters())


def test_chains_of_replaced_parameters_are_refused():
    model = training.arm(made(), dtype=torch.bfloat16)
    (batch,) = batches(sequences()[:2], RIGHT)
    with pytest.raises(UnsupportedFeature, match="belong to no parameter"):
        with training.gradients(model):
            training.logprobs(model, batch.ids, batch.mask).sum().backward()
            layer = model.model.layers[0].mlp.up_proj  # as FSDP2 does after a pass
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone())


def test_a_compiled_model_runs_as_eager_code():
    model = training.arm(made(), dtype=torch.bfloat16)
    want = gradient(model, [8])
    (batch,) = batches(sequences(), RIGHT)
    with training.gradients(model):
        found = training.logprobs(torch.compile(model), batch.ids, batch.mask, batch.positions)
        loss(found, batch.places, sequences(), gains()).backward()
    assert not any(bits.differing(p.main_grad, want[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("chains", [True, False])
def test_selective_checkpointing_keeps_what_it_is_told_to_keep(chains, monkeypatch):
    """Linear layers are kept, and all else is computed again: the same bits, and no product twice."""
    model = training.arm(made(), dtype=torch.bfloat16)
    kept = [torch.ops.bi_training.linear.default]
    ran = []
    from bi_patch.training.cpu import linear

    own = linear.linear
    monkeypatch.setattr(linear, "linear", lambda *given: ran.append(len(given[0])) or own(*given))

    def run():
        ran.clear()
        with training.gradients(model) if chains else contextlib.nullcontext():
            (batch,) = batches(sequences(), PACKED)
            found = training.logprobs(model, batch.ids, position_ids=batch.positions)
            loss(found, batch.places, sequences(), gains()).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        return grads, len(ran)

    plain, once = run()
    for context, times in ((None, 2), (functools.partial(create_selective_checkpoint_contexts, kept), 1)):
        given = {"use_reentrant": False} | ({} if context is None else {"context_fn": context})
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given)
        found, count = run()
        assert count == times * once
        assert not any(bits.differing(found[name], value) for name, value in plain.items())


@pytest.fixture
def ranks(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_models_of_several_ranks_are_refused(ranks, monkeypatch):
    model = training.arm(made(), dtype=torch.bfloat16)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    with training.gradients(wrapped):
        pass
    monkeypatch.setattr(type(wrapped.process_group), "size", lambda self: 2)
    with pytest.raises(UnsupportedFeature, match="training.gradients: DistributedDataParallel"):
        with training.gradients(wrapped):
            pass
    monkeypatch.undo()
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)
    with pytest.raises(UnsupportedFeature, match="training.gradients: .*DTensor"):
        with training.gradients(model):
            pass
