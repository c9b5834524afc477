"""bi_patch's own operators: each is defined once, kept, and traced by its fake function."""

import gc

import pytest
import torch

from bi_patch.ops.registration import define


def doubled(x):
    return x * 2


def test_an_operator_is_defined_once_and_stays():
    schema = "test_doubled(Tensor x) -> Tensor"
    define(schema, doubled, "CPU", torch.empty_like)
    define(schema, None, "CPU", None)  # does nothing
    gc.collect()
    assert torch.equal(torch.ops.bi_patch.test_doubled(torch.ones(3)), torch.full((3,), 2.0))
    assert torch.ops.bi_patch.test_doubled(torch.ones(3, 4, device="meta")).shape == (3, 4)


def test_no_argument_has_a_default():
    with pytest.raises(ValueError, match="no argument may have a default"):
        define("test_default(Tensor x, bool more=False) -> Tensor", doubled, "CPU", torch.empty_like)
    assert not hasattr(torch.ops.bi_patch, "test_default")


def test_compiled_code_calls_it_whole():
    define("test_opaque(Tensor x) -> Tensor", lambda x: x + int(x.sum()), "CPU", torch.empty_like)
    compiled = torch.compile(
        lambda x: torch.ops.bi_patch.test_opaque(x) * 2, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (2, 3):
        assert torch.equal(compiled(torch.ones(rows)), torch.full((rows,), 2.0 * (1 + rows)))


def test_the_operators_of_cuda_say_their_shapes():
    from bi_patch.ops.cuda import linear, norm, rotary

    for make in (linear.define_op, norm.define_ops, rotary.define_op) * 2:
        make()
    ops = torch.ops.bi_patch
    x, weight = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((2, 3, 8), (5, 8)))
    assert ops.linear(x, weight, None).shape == (2, 3, 5)
    assert ops.rms_norm(x, None, 1e-6, 0.0).shape == x.shape
    assert [out.shape for out in ops.add_rms_norm(x, x, None, 1e-6, 0.0)] == [x.shape, x.shape]
    q, k = x[0], weight[:3]
    turned = ops.rope(torch.empty(3, device="meta"), q, k, weight, 4, None, None, 0.0)
    assert [out.shape for out in turned] == [q.shape, k.shape]
    assert all(out.dtype == torch.bfloat16 for out in turned)
