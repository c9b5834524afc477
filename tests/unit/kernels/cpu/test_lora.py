"""The CPU kernel of LoRA: its accuracy, rows without an adapter, and equal bits for a row in any company."""

import pytest
import torch

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23}
RANKS = (8, 16, 64, 200, 256)


def make(rows, n, k, ranks, dtype, seed=0, room=256):
    """y, x, and stacks of one adapter of each rank, padded to `room`."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.zeros(len(ranks), room, k), torch.zeros(len(ranks), n, room)
    for s, rank in enumerate(ranks):
        a[s, :rank] = torch.randn(rank, k, generator=g) * k**-0.5
        b[s, :, :rank] = torch.randn(n, rank, generator=g) * rank**-0.5
    y, x = torch.randn(rows, n, generator=g), torch.randn(rows, k, generator=g)
    return [t.to(dtype) for t in (y, x, a, b)]


def run(ops, y, x, a, b, slots):
    held = y.clone()
    ops.lora(held, x, a, b, torch.tensor(slots))
    return held


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,k", [(33, 65), (70, 513), (257, 1100)])
def test_accuracy(ops, dtype, n, k):
    y, x, a, b = make(len(RANKS) * 3, n, k, RANKS, dtype)
    slots = [i % len(RANKS) for i in range(len(y))]
    got = run(ops, y, x, a, b, slots)
    for i, s in enumerate(slots):
        x1, a1, b1 = (held.double() for held in (x[i], a[s], b[s]))
        want = y[i].double() + (x1 @ a1.T) @ b1.T
        # Three roundings to the type, and one fp32 rounding for each term of the two sums.
        terms = (x1.abs() @ a1.T.abs()) @ b1.T.abs()
        room = EPS[dtype] * (want.abs() + 2 * terms) + (k + RANKS[s]) * 2**-23 * terms
        assert ((got[i].double() - want).abs() <= room).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,k", [(48, 64), (70, 513)])
def test_a_row_has_the_bits_of_the_row_alone(ops, dtype, n, k):
    y, x, a, b = make(150, n, k, RANKS, dtype)
    slots = [(i * 7) % (len(RANKS) + 1) - 1 for i in range(150)]
    got = run(ops, y, x, a, b, slots)
    for i, s in enumerate(slots):
        one = slice(max(s, 0), max(s, 0) + 1)
        alone = run(ops, y[i : i + 1], x[i : i + 1], a[one], b[one], [min(s, 0)])
        assert torch.equal(got[i], alone[0]), (i, s)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    places = [len(RANKS) - 1 - slots[i] if slots[i] >= 0 else -1 for i in order]
    moved = run(ops, y[order], x[order], a.flip(0), b.flip(0), places)
    assert torch.equal(moved, got[order])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_an_adapter_is_not_touched(ops, dtype):
    y, x, a, b = make(9, 40, 96, RANKS, dtype)
    y[::2] = -0.0
    y[1::2] = float("nan")
    got = run(ops, y, x, a, b, [-1] * 9)
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got.view(kind), y.view(kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_room_of_a_slot_changes_nothing(ops, dtype):
    y, x, a, b = make(20, 50, 130, (8, 24), dtype, room=24)
    wide_a, wide_b = torch.zeros(2, 256, 130, dtype=dtype), torch.zeros(2, 50, 256, dtype=dtype)
    wide_a[:, :24], wide_b[:, :, :24] = a, b
    slots = [i % 2 for i in range(20)]
    assert torch.equal(run(ops, y, x, a, b, slots), run(ops, y, x, wide_a, wide_b, slots))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_slot_adds_nothing(ops, dtype):
    y, x, a, b = make(5, 50, 130, (8,), dtype)
    assert torch.equal(run(ops, y, x, torch.zeros_like(a), torch.zeros_like(b), [0] * 5), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_part_of_the_columns_and_shrunk_rows(ops, dtype):
    y, x, a, b = make(6, 90, 64, (16, 8), dtype, room=16)
    slots = [0, 1, -1, 1, 0, 0]
    want = run(ops, y[:, 20:80].contiguous(), x, a, b[:, 20:80].contiguous(), slots)
    held = y.clone()
    ops.lora(held[:, 20:80], x, a, b[:, 20:80].contiguous(), torch.tensor(slots))
    assert torch.equal(held[:, 20:80], want)
    assert torch.equal(held[:, :20], y[:, :20]) and torch.equal(held[:, 80:], y[:, 80:])
    t = torch.stack([ops.gemm(x[i], ops.gemm_pack(a[s]), 16, 64, None) for i, s in enumerate(slots)])
    held = y.clone()
    ops.lora(held, t, None, b, torch.tensor(slots))
    assert torch.equal(held, run(ops, y, x, a, b, slots))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(ops, threads, dtype):
    y, x, a, b = make(200, 300, 577, RANKS, dtype)
    slots = [i % 6 - 1 for i in range(200)]
    got = []
    for t in (1, 2, 3):
        threads(t)
        got.append(run(ops, y, x, a, b, slots))
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


def test_bad_arguments(ops):
    y, x, a, b = make(4, 32, 48, (8, 8), torch.float32)
    for given, said in (
        ((y, x, a, b, [2, 0, 0, 0]), "slot 2 of 2"),
        ((y, x, a, b, [0, 0]), "slots"),
        ((y, x.half(), a, b, [0] * 4), "x is"),
        ((y, x, a[:1], b, [0] * 4), "does not fit"),
        ((y, x, a, b[:, :8].contiguous(), [0] * 4), "does not make"),
        ((y, x, None, b, [0] * 4), "does not fit"),
    ):
        with pytest.raises(RuntimeError, match=said):
            run(ops, *given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights_are_kept(ops, dtype):
    y, x, a, b = make(12, 50, 130, (8, 24, 16), dtype, room=24)
    packed, ranks = torch.zeros(3, ops.lora_room(a, b), dtype=dtype), torch.full((3,), -1)
    slots = torch.tensor([0, 2, -1] * 4)
    for _ in range(2):
        held = y.clone()
        ops.lora(held, x, a, b, slots, packed, ranks)
        assert torch.equal(held, run(ops, y, x, a, b, slots.tolist()))
        assert ranks.tolist() == [8, -1, 16]
    a[2] = 0
    ops.lora(held, x, a, b, slots, packed, ranks)
    assert ranks.tolist() == [8, -1, 16]  # the caller says when a slot was written
    ranks.fill_(-1)
    held = y.clone()
    ops.lora(held, x, a, b, slots, packed, ranks)
    assert ranks.tolist() == [8, -1, 0] and torch.equal(held, run(ops, y, x, a, b, slots.tolist()))
    with pytest.raises(RuntimeError, match="go together"):
        ops.lora(held, x, a, b, slots, packed, None)
    with pytest.raises(RuntimeError, match="slot 0 has rank 99"):
        ops.lora(held, x, a, b, slots, packed, torch.full((3,), 99))
    with pytest.raises(RuntimeError, match="packed has"):
        ops.lora(held, x, a, b, slots, packed[:2].contiguous(), ranks)
