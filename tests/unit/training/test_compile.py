"""torch.compile of an armed model: the bits of eager code, forward and backward."""

import copy
import gc

import pytest
import torch
from torch._inductor import config

from bi_patch import training
from bi_patch.ops import bits
from bi_patch.ops.cpu import aten


@pytest.fixture(autouse=True)
def no_armed_model_of_another_test():
    gc.collect()


def test_compiled_code_has_the_bits_of_eager_code(make, ids):
    model = make("Gemma 3", torch.bfloat16, num_hidden_layers=1, layer_types=["full_attention"])
    before = config.emulate_precision_casts
    training.arm(model)

    def run(module):
        found = training.logprobs(module, *ids)
        found.sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        return found.detach(), grads

    (eager, grads), (compiled, compiled_grads) = run(model), run(torch.compile(model))
    assert not bits.differing(compiled, eager)
    assert all(not bits.differing(compiled_grads[name], grads[name]) for name in grads)
    training.disarm(model)
    assert config.emulate_precision_casts == before


def test_compiled_code_rounds_as_eager_code_until_the_last_user_ends(make):
    """An engine, two armed models and a copy of a model, in one process."""
    before = config.emulate_precision_casts
    first, second = make("Llama", num_hidden_layers=1), make("Llama", num_hidden_layers=1)
    training.arm(first)
    reference = copy.deepcopy(first)
    training.disarm(first)
    assert config.emulate_precision_casts  # the copy is armed
    aten.keep_whole()
    training.disarm(reference)
    assert config.emulate_precision_casts  # the engine is
    training.arm(second)
    aten.restore()
    assert config.emulate_precision_casts
    training.disarm(second)
    training.disarm(second)
    assert config.emulate_precision_casts == before
    training.arm(second)
    del second
    gc.collect()
    assert config.emulate_precision_casts == before


def test_a_copy_of_a_disarmed_model_holds_nothing(make):
    before = config.emulate_precision_casts
    model = make("Llama", num_hidden_layers=1)
    training.arm(model)
    training.disarm(model)
    copied = copy.deepcopy(model)
    assert config.emulate_precision_casts == before and copied is not model
