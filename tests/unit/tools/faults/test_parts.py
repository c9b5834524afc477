"""Parts of faults compute what the layers that they replace compute, up to rounding: only the order is another."""

from types import SimpleNamespace

import msgspec
import pytest
import torch

from bi_patch.tools.evidence import FaultRow, Faults
from bi_patch.tools.faults import attention, base, every, named, parts, shared
from bi_patch.tools.faults.run import write


def close(a, b, limit=1e-5):
    return bool(((a - b).abs() <= limit * b.abs().max()).all())


def test_attention_in_any_cut_is_attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(5, 8, 16), torch.randn(40, 2, 16), torch.randn(40, 2, 16)
    whole = parts.attend(query, key, value, [], 0.25)
    mask = torch.arange(40)[None] <= torch.arange(35, 40)[:, None]
    k, v = (t.transpose(0, 1).repeat_interleave(4, 0) for t in (key, value))
    wide = torch.nn.functional.scaled_dot_product_attention(query.transpose(0, 1), k, v, attn_mask=mask, scale=0.25)
    wide = wide.transpose(0, 1)
    assert close(whole, wide)
    for edges in ([20], [36], [8, 16, 24, 32], [39], [40], [0]):
        cut = parts.attend(query, key, value, edges, 0.25)
        assert close(cut, wide), edges
    assert not torch.equal(parts.attend(query, key, value, [8, 16, 24, 32], 0.25), whole)


@pytest.mark.parametrize("layout", ["halves", "leading", "second"])
def test_every_layout_of_a_cache_is_read_alike(layout):
    torch.manual_seed(1)
    key, value = torch.randn(6, 16, 2, 8), torch.randn(6, 16, 2, 8)  # blocks, tokens, kv heads, D
    cache = {
        "halves": torch.cat([key, value], -1).transpose(1, 2).contiguous(),
        "leading": torch.stack([key, value]),
        "second": torch.stack([key, value], 1),
    }[layout]
    assert attention._pages(cache, 8).shape[2] == 16
    k, v = attention._unpack(cache, torch.tensor([3, 1]), 20, 8)
    assert torch.equal(k, torch.cat([key[3], key[1]])[:20]) and torch.equal(v, torch.cat([value[3], value[1]])[:20])


def test_only_the_chosen_sequences_are_overwritten():
    torch.manual_seed(2)
    key, value = torch.randn(4, 16, 2, 8), torch.randn(4, 16, 2, 8)
    query, out = torch.randn(7, 4, 8), torch.zeros(7, 4, 8)
    starts, lengths = torch.tensor([0, 3, 7]), torch.tensor([20, 30])
    table = torch.tensor([[0, 1], [2, 3]])

    def read(blocks, length):
        return key[blocks].flatten(0, 1)[:length], value[blocks].flatten(0, 1)[:length]

    seen = []

    def cut(sequence):
        seen.append((sequence.query, sequence.length, sequence.count, sequence.longest, sequence.common))
        return [9] if sequence.length == 30 else None

    attention.overwrite(cut, out, query, starts, lengths, table, 16, read, 0.3)
    assert seen == [(3, 20, 2, 4, 0), (4, 30, 2, 4, 0)]
    assert not out[:3].any()
    assert torch.equal(out[3:], parts.attend(query[3:], *read(table[1], 30), [9], 0.3))


def test_a_norm_in_blocks_is_the_norm():
    torch.manual_seed(3)
    layer = SimpleNamespace(variance_epsilon=1e-6, weight=torch.nn.Parameter(torch.rand(64)))
    x, residual = torch.randn(5, 64), torch.randn(5, 64)
    want = torch.nn.functional.rms_norm(x + residual, (64,), layer.weight.data, 1e-6)
    for blocks in (2, 4):
        y, total = parts.two_block_norm(layer, x, residual, blocks)
        assert close(y, want) and torch.equal(total, x + residual)


def test_ranks_sum_to_the_same_in_each_order():
    stacked = torch.randn(4, 3, 32)
    reduce = shared._reduce_op()
    one, two = reduce(stacked, False), reduce(stacked, True)
    assert close(one, stacked.sum(0)) and close(two, stacked.sum(0)) and not torch.equal(one, two)


def test_fewer_bits_are_those_of_tf32():
    x = torch.randn(1000)
    cut = shared._fewer_bits(x)
    assert not (cut.view(torch.int32) & 0x1FFF).any() and close(cut, x, 2**-11) and not torch.equal(cut, x)


def test_every_fault_says_what_it_needs():
    for fault in every():
        assert fault.about and fault.plant and fault.axis and fault.platforms and named(fault.name) is fault
        assert fault.seam is None or set(fault.platforms) <= set(fault.seam), fault.name
    assert {f.cause for f in every() if "cuda" in f.platforms} >= set(range(1, 26)) - {17, 24}


def test_a_run_replaces_the_file_of_an_earlier_one(tmp_path):
    rows = [FaultRow(1, "one", True, True), FaultRow(2, "two", True, True)]
    found = Faults(device="a CPU (2 cores)", vllm="0.32.0", torch="2.13.0", date="2026-01-01", rows=rows)
    write(found, tmp_path)
    later = msgspec.structs.replace(found, device="another CPU (4 cores)", rows=found.rows[:1])
    path = write(later, tmp_path)
    assert path.name == "faults-2026-01-01-cpu-vllm-0.32.0.json"
    assert write(later, tmp_path) == path and list(tmp_path.iterdir()) == [path]
    assert msgspec.json.decode(path.read_bytes(), type=Faults) == later
    assert len(found.rows) == 2 and len(later.rows) == 1, "the caller's rows are its own"


def test_what_is_not_there_is_refused():
    with pytest.raises(base.UnknownFault, match="there is no fault"):
        named("nothing")
