"""On a GPU: products with packed weights give a row the same bits in any batch, those of the dequantized weights."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
N, K = 1280, 2048


@pytest.fixture(autouse=True)
def ops():
    from bi_patch.ops.cuda import linear, machine, packed_linear

    machine.forbid_split_k()
    linear.define_op()
    packed_linear.define_op()


def made(bits, group, zeros, dtype):
    """Packed weights, and the exact weights in fp64."""
    from bi_patch.kernels.packing import pack

    generator = torch.Generator("cuda").manual_seed(bits * group)
    q = torch.randint(0, 2**bits, (N, K), generator=generator, device="cuda", dtype=torch.uint8)
    scale = (torch.rand((N, K // group), generator=generator, device="cuda") * 0.01 + 0.002).to(dtype)
    zero = None
    if zeros:
        zero = torch.randint(0, 2**bits, (N, K // group), generator=generator, device="cuda", dtype=torch.uint8)
    middle = 2 ** (bits - 1) if zero is None else zero.double().repeat_interleave(group, 1)
    exact = (q.double() - middle) * scale.double().repeat_interleave(group, 1)
    return pack(q, scale, zero, bits), exact


@pytest.mark.parametrize(
    ("bits", "group", "zeros", "dtype", "bias"),
    [
        (4, 128, True, torch.bfloat16, False),
        (4, 128, False, torch.bfloat16, True),
        (4, 32, True, torch.float16, False),
        (4, K, False, torch.bfloat16, False),
        (8, K, False, torch.bfloat16, True),
        (8, 128, False, torch.bfloat16, False),
        (8, 128, True, torch.bfloat16, True),
        (8, 32, False, torch.float16, False),
        (8, 64, True, torch.float16, False),
    ],
)
def test_a_row_has_its_bits_in_any_batch(bits, group, zeros, dtype, bias, tmp_path):
    from bi_patch.ops.cuda import linear, packed_linear

    problem = packed_linear.Problem(N, K, dtype, bias, bits, group, zeros)
    linear.certify([problem.dequantized()], 600, tmp_path)
    (first,) = packed_linear.certify([problem], 600, tmp_path)
    (again,) = packed_linear.certify([problem], 600, tmp_path)
    assert first == again and first.evidence.compared and first.passed, first.evidence
    packed, exact = made(bits, group, zeros, dtype)
    assert torch.equal(packed_linear.dequantize(packed), exact.to(dtype))
    x = torch.randn(700, K, device="cuda").to(dtype)
    held = torch.randn(N, device="cuda", dtype=dtype) if bias else None
    product = torch.ops.bi_patch.packed_linear

    def run(rows):
        return product(rows, packed.data, packed.scale, packed.zero, held, bits, group, None)

    whole = run(x)
    assert torch.equal(whole, linear.bundled(x, exact.to(dtype), held, False))
    want = x.double() @ exact.T + (held.double() if bias else 0)
    assert (whole.double() - want).norm() / want.norm() < 4e-3
    for at, m in ((0, 1), (3, 2), (0, 8), (8, 9), (8, 16), (1, 17), (0, 64), (0, 65), (100, 128), (0, 300), (0, 601)):
        assert torch.equal(run(x[at : at + m]), whole[at : at + m]), (at, m)


@pytest.mark.parametrize(("group", "bias"), [(16, True), (32, False)])
def test_floats_of_4_bits_have_their_bits_in_any_batch(group, bias, tmp_path):
    from bi_patch.kernels.packing import pack_floats
    from bi_patch.ops.cuda import factored_linear, packed_linear

    problem = packed_linear.Problem(N, K, torch.bfloat16, bias, 4, group, False, True)
    other = problem.dequantized()
    assert (other is None) == bias
    if other is not None:
        (made,) = factored_linear.certify([other], 600, tmp_path)
        assert made.passed and factored_linear.serves(other, 600), made.evidence
    (first,) = packed_linear.certify([problem], 600, tmp_path)
    (again,) = packed_linear.certify([problem], 600, tmp_path)
    assert first == again and first.evidence.compared and first.passed, first.evidence
    generator = torch.Generator("cuda").manual_seed(group)
    q = torch.randint(0, 16, (N, K), generator=generator, device="cuda", dtype=torch.uint8)
    scale = torch.randn((N, K // group), generator=generator, device="cuda").mul(32).to(torch.float8_e4m3fn)
    scale[0, :4] = torch.tensor([0, 2**-9, 448, 3 * 2**-9], device="cuda")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device="cuda")[q.long() & 7]
    exact = values * torch.where(q > 7, -1, 1) * scale.double().repeat_interleave(group, 1)
    whole = torch.tensor(0.0123, device="cuda")
    packed = pack_floats(q, scale, whole)
    assert torch.equal(packed_linear.dequantize(packed).double(), exact * 2**-7)
    x = torch.randn(700, K, device="cuda").bfloat16()
    held = torch.randn(N, device="cuda").bfloat16() if bias else None

    def run(rows):
        given = packed.data, packed.scale, None, held, 4, group, packed.whole
        return torch.ops.bi_patch.packed_linear(rows, *given)

    got = run(x)
    want = x.double() @ exact.T * whole.double() + (held.double() if bias else 0)
    assert (got.double() - want).norm() / want.norm() < 4e-3
    for at, m in ((0, 1), (3, 2), (0, 8), (8, 9), (8, 16), (1, 17), (0, 64), (0, 65), (100, 128), (0, 300), (0, 601)):
        assert torch.equal(run(x[at : at + m]), got[at : at + m]), (at, m)
    if other is not None:  # whichever way is faster, dequantized weights have the same bits
        product = factored_linear.product(x[:600], packed_linear.dequantize(packed), packed.whole)
        assert torch.equal(product, got[:600])
