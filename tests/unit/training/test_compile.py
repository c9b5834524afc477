"""torch.compile of an armed model: the bits of eager code, forward and backward."""

import torch

from bi_patch import training
from bi_patch.ops import bits


def test_compiled_code_has_the_bits_of_eager_code(make, ids):
    model = make("Gemma 3", torch.bfloat16, num_hidden_layers=1, layer_types=["full_attention"])
    before = torch._inductor.config.emulate_precision_casts
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
    assert torch._inductor.config.emulate_precision_casts == before
