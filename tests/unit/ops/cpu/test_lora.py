"""LoRA on CPU: the stacks of vLLM, written while they are in use; embeddings; dtypes."""

import pytest
import torch

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops.cpu import lora, machine


@pytest.fixture(autouse=True)
def kernels(cache):
    machine.load_kernels(cache)


def stacks(rank=16, k=96, n=40, slots=3):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(slots, 1, rank, k, generator=generator) * k**-0.5
    return a, torch.randn(slots, 1, n, rank, generator=generator)


def fresh(y, x, a, b, slots):
    held = y.clone()
    lora.add(held, x, None if a is None else a.clone(), b.clone(), slots)
    return held


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_written_stacks_are_seen(mode):
    a, b = stacks()
    x, y, slots = torch.randn(6, 96), torch.randn(6, 40), torch.tensor([0, 1, -1, 2, 1, 0])
    with mode():
        for write in (
            lambda: None,
            lambda: a[1].zero_(),
            lambda: a[1, 0, :8, :].copy_(torch.randn(8, 96)),
            lambda: b[2, 0, :, :8].copy_(torch.randn(40, 8)),
            lambda: b.__setitem__(0, 0),
        ):
            write()
            held = y.clone()
            lora.add(held, x, a, b, slots)
            assert torch.equal(held, fresh(y, x, a, b, slots))


def test_stacks_without_a_count_of_writes_are_packed_in_each_call():
    with torch.inference_mode():
        a, b = stacks()
        x, y, slots = torch.randn(3, 96), torch.randn(3, 40), torch.tensor([0, 1, 2])
        for _ in range(2):
            held = y.clone()
            lora.add(held, x, a, b, slots)
            assert torch.equal(held, fresh(y, x, a, b, slots))
            b[1] = 0


def test_two_stacks_of_equal_shape_are_not_mixed_up():
    a, b = stacks()
    x, y, slots = torch.randn(3, 96), torch.randn(3, 40), torch.tensor([0, 1, 2])
    for _ in range(3):
        a2, b2 = stacks()
        b2 *= 2
        held = y.clone()
        lora.add(held, x, a2, b2, slots)
        assert torch.equal(held, fresh(y, x, a2, b2, slots))
    assert not torch.equal(fresh(y, x, a, b, slots), held)


def test_padding_rows_and_columns_are_not_touched():
    a, b = stacks()
    x, y = torch.randn(6, 96), torch.randn(6, 44)
    held = y.clone()
    lora.add(held, x, a, b, torch.tensor([0, -1, 2]))
    assert torch.equal(held[3:], y[3:]) and torch.equal(held[:, 40:], y[:, 40:]) and torch.equal(held[1], y[1])
    assert torch.equal(held[:3, :40], fresh(y[:3, :40].contiguous(), x[:3], a, b, torch.tensor([0, -1, 2])))
    held = y[:, :36].contiguous()  # fewer columns than the adapter
    lora.add(held, x, a, b, torch.tensor([0, -1, 2]))
    assert torch.equal(held[0], fresh(y[:1, :40].contiguous(), x[:1], a, b, torch.tensor([0]))[0, :36])


def test_an_embedding_takes_the_rows_of_its_tokens():
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(3, 50, 16, generator=generator)
    b = torch.randn(3, 1, 40, 16, generator=generator)
    ids, slots, y = torch.tensor([7, 7, 49, 0, 7]), torch.tensor([0, 2, -1, 1, 0]), torch.randn(5, 40)
    held = y.clone()
    lora.embed(held, ids, a, b, slots)
    assert torch.equal(held[2], y[2])
    for i in (0, 1, 3, 4):
        alone = y[i : i + 1].clone()
        lora.add(alone, a[slots[i], ids[i]][None].contiguous(), None, b, slots[i : i + 1])
        assert torch.equal(alone[0], held[i])


def test_other_types_are_refused():
    a, b = stacks()
    with pytest.raises(UnsupportedFeature, match="lora.cpu: an adapter's product of torch.bfloat16, torch.float32"):
        lora.add(torch.zeros(2, 40), torch.zeros(2, 96), a.bfloat16(), b.bfloat16(), torch.tensor([0, 0]))
