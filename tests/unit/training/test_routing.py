"""The experts of a trainer beside the sampler's: every choice counts, and a difference has a name."""

from types import SimpleNamespace

import numpy
import pytest
import torch

from bi_patch import training
from bi_patch.errors import RoutingDiffers

LAYERS, CHOSEN = 2, 2


@pytest.fixture
def model(make, monkeypatch):
    """An armed Mixtral whose experts return their input: their kernel is vLLM's, which no unit test loads."""
    monkeypatch.setattr("bi_patch.training.cpu.experts.experts", lambda x, *_: x.clone())
    return training.arm(make("Mixtral", num_hidden_layers=LAYERS))


def answer(tokens, experts, reason="length"):
    scores = [{token: SimpleNamespace(logprob=-1.0)} for token in tokens[3:]]
    done = SimpleNamespace(
        token_ids=tokens[3:], logprobs=scores, finish_reason=reason, routed_experts=experts, weights_changed=False
    )
    return SimpleNamespace(prompt_token_ids=tokens[:3], outputs=[done])


def sampled(model, *tokens):
    """Answers with the model's own choices: of each token but the last, in each layer."""
    return [answer(own, choices(model, own).numpy().astype("uint8")) for own in tokens]


def choices(model, tokens):
    """The experts of all tokens but the last [tokens - 1, layers, k]."""
    seen, functions = [], training.huggingface.armed(model).functions
    route = functions["route"]
    functions["route"] = lambda *given: seen.append(route(*given)) or seen[-1]
    training.logprobs(model, torch.tensor([tokens]))
    functions["route"] = route
    return torch.stack([ids for _, ids in seen], 1)[:-1]


FIRST, SECOND = list(range(5, 17)), list(range(40, 47))


@pytest.mark.parametrize("side", ["right", "left"])
def test_equal_choices_are_counted(model, side):
    held = training.batch(sampled(model, FIRST, SECOND), side=side)
    found = training.compare(training.logprobs(model, held), held)
    assert (found.routing.compared, found.routing.differing) == ((11 + 6) * LAYERS * CHOSEN, 0)
    assert f"0 of {found.routing.compared} choices of experts differ" in str(found)


def test_one_other_expert_is_named(model):
    answers = sampled(model, FIRST, SECOND)
    ids = answers[1].outputs[0].routed_experts
    ids[4, 1, 0], ids[4, 1, 1] = ids[4, 1, 1], ids[4, 1, 0]
    held = training.batch(answers)
    new = training.logprobs(model, held)
    found = training.compare(new, held)
    assert found.routing.differing == 2 and not found.exact
    with pytest.raises(RoutingDiffers, match="2 of 68 .* first in row 1, position 4, layer 1"):
        training.compare(new, held, strict=True)


def test_rows_that_nobody_may_compare_are_left_out(model):
    answers = sampled(model, FIRST, SECOND)
    answers[1].outputs[0].finish_reason = "abort"
    held = training.batch(answers)
    assert training.compare(training.logprobs(model, held), held).routing.compared == 11 * LAYERS * CHOSEN


def test_a_compiled_model_compares_too(model):
    held = training.batch(sampled(model, FIRST))
    compiled = torch.compile(model, backend="eager")
    found = training.compare(training.logprobs(compiled, held), held)
    assert (found.routing.compared, found.routing.differing) == (11 * LAYERS * CHOSEN, 0)


def test_experts_that_nobody_compared(model):
    held = training.batch(sampled(model, FIRST))
    new = training.logprobs(model, held.ids)
    with pytest.raises(RoutingDiffers, match="nobody compared"):
        training.compare(new, held, strict=True)


def test_another_number_of_experts(model):
    answers = sampled(model, FIRST)
    answers[0].outputs[0].routed_experts = numpy.zeros((11, LAYERS, 3), dtype="uint8")
    with pytest.raises(RoutingDiffers, match="2 experts for a token, and the sampler 3"):
        training.logprobs(model, training.batch(answers))
