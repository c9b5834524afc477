"""Rotations of tokens with positions of time, height and width: the rows of vLLM, and one token's rows alone."""

import pytest
import torch

from bi_patch.ops.cpu import machine, rotary

SIZES = (6, 5, 5)


def stock(positions, cache, interleaved):
    """Cosines and sines as vLLM's MRotaryEmbedding.forward_native chooses them."""
    from vllm.model_executor.layers.rotary_embedding.mrope import apply_interleaved_rope

    made = []
    for part in cache[positions].chunk(2, dim=-1):
        if interleaved:
            made.append(apply_interleaved_rope(part, list(SIZES)))
        else:
            made.append(torch.cat([m[i] for i, m in enumerate(part.split(SIZES, dim=-1))], dim=-1))
    return torch.cat(made, dim=-1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_each_section_has_its_own_position(interleaved, cache):
    machine.load_kernels(cache)
    table = torch.randn(50, 2 * sum(SIZES))
    positions = torch.randint(0, 50, (3, 9))
    rows = rotary.sections(positions, table, SIZES, interleaved)
    assert torch.equal(rows, stock(positions, table, interleaved))
    x = torch.randn(9, 3 * 40)
    whole = rotary.rope(torch.arange(9), x, rows, 40, True)
    for i in range(9):
        alone = rotary.sections(positions[:, i : i + 1], table, SIZES, interleaved)
        assert torch.equal(rotary.rope(torch.arange(1), x[i : i + 1], alone, 40, True), whole[i : i + 1])


def test_equal_positions_turn_as_a_text_does(cache):
    machine.load_kernels(cache)
    table, x, places = torch.randn(50, 2 * sum(SIZES)), torch.randn(9, 2 * 32), torch.randint(0, 50, (9,))
    for interleaved in (False, True):
        rows = rotary.sections(places.expand(3, -1), table, SIZES, interleaved)
        assert torch.equal(rotary.rope(torch.arange(9), x, rows, 32, True), rotary.rope(places, x, table, 32, True))
