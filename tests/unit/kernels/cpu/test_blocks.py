"""The memory of large results: kept between calls, never shared by two living results, and bounded."""

import gc
import os
from pathlib import Path

import pytest
import torch

LARGE = 2 << 20  # bytes from which on a result lies in a kept block


def result(ops, bytes_, value=1.0):
    """A result of the gated activation, of `bytes_` bytes in bf16: silu(value) * value everywhere."""
    return ops.silu_and_mul(torch.full((bytes_ // 128, 128), value).to(torch.bfloat16))


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_freed_block_serves_the_next_result(ops):
    x = torch.randn(4096, 1024).bfloat16()
    w = torch.randn(640, 1024).bfloat16()
    packed = ops.gemm_pack(w)
    first = ops.gemm(x, packed, 640, 1024, None)
    kept, place = first.clone(), first.data_ptr()
    del first
    again = ops.gemm(x, packed, 640, 1024, None)
    assert again.data_ptr() == place and place % LARGE == 0
    # A smaller result may take the block, another one at the same time may not.
    assert torch.equal(again, kept)
    del again
    smaller, other = ops.gemm(x[:3000], packed, 640, 1024, None), ops.gemm(x, packed, 640, 1024, None)
    assert smaller.data_ptr() == place != other.data_ptr()
    assert torch.equal(smaller, kept[:3000]) and torch.equal(other, kept)


def test_living_results_share_no_memory(ops):
    held = [result(ops, LARGE + 128 * i, 1.0 + i) for i in range(12)]
    for i in range(0, 12, 2):
        held[i] = result(ops, 2 * LARGE, 100.0 + i)
    places = sorted((y.data_ptr(), y.numel() * y.element_size()) for y in held)
    assert all(a + size <= b for (a, size), (b, _) in zip(places, places[1:], strict=False))
    for i, y in enumerate(held):
        x = torch.tensor(1.0 + i if i % 2 else 100.0 + i).bfloat16().float()
        assert torch.equal(y, (x * torch.sigmoid(x) * x).bfloat16().expand_as(y))


def test_a_result_is_a_tensor_like_any_other(ops):
    y = result(ops, LARGE)
    want = y.clone()
    view = y[5:9]
    del y
    result(ops, LARGE, 7.0)
    assert torch.equal(view, want[5:9])  # a view keeps the block
    grown = result(ops, LARGE)
    grown.resize_(3 * LARGE // 128, 64)
    assert torch.equal(grown[: len(want)], want)
    grown.untyped_storage().resize_(0)
    with torch.inference_mode():
        assert result(ops, LARGE).is_inference()


@pytest.mark.slow
def test_kept_memory_is_bounded(ops):
    size = 100 << 20
    x = torch.zeros(size // 128, 128, dtype=torch.bfloat16)
    held = [ops.silu_and_mul(x) for _ in range(6)]
    most = resident()
    del held
    gc.collect()
    assert most - resident() > size // 2, "at most 512 MiB are kept"


def test_a_forked_process_has_blocks_of_its_own(ops):
    y = result(ops, LARGE)
    want = y.clone()
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        held = y
        other = torch.empty_like(want).copy_(held)
        held.zero_()
        os._exit(0 if torch.equal(other, want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(y, want)
