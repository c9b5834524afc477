"""The comparison finds the first difference between two invented traces."""

import hashlib

from bi_patch.tools.verify.align import compare
from bi_patch.tools.verify.trace import FORWARD, MODULE, SAMPLE, WIDTH, Call, Trace, chain, kernels


def digest(value: object) -> bytes:
    return hashlib.blake2b(repr(value).encode(), digest_size=WIDTH).digest()


def call(op, start, values, *, step=0, phase=FORWARD, module="layer", m=None, width=4):
    rows = b"".join(digest(v) for v in values)
    shape = (m or len(values), width)
    return Call(step, phase, module, "Linear", op, 0, start, rows, shape, (width, 1), "float32", "linear.seam", op)


def prefill(values, *, then="out", step=0, start=0):
    return [call("mm", start, values, step=step), call(then, start, [(then, v) for v in values], step=step)]


def test_equal_traces_have_no_first_difference():
    one = Trace(prefill("abcd"))
    found = compare(one, one)
    assert found.first is None and found.compared == 8


def test_the_earliest_position_wins_over_the_earliest_op():
    alone = Trace([call("mm", 0, "abcd"), call("add", 0, "efgh")])
    company = Trace([call("mm", 0, "abcX"), call("add", 0, "eXgX")])
    first = compare(alone, company).first
    assert (first.position, first.company.op) == (1, "add")


def test_at_one_position_the_first_op_in_execution_order_wins():
    alone = Trace([call("mm", 0, "ab"), call("add", 0, "cd"), call("mul", 0, "ef")])
    company = Trace([call("mm", 0, "ab"), call("add", 0, "cX"), call("mul", 0, "eX")])
    assert compare(alone, company).first.company.op == "add"


def test_chunks_align_by_position():
    alone = Trace(prefill("abcdef"))
    company = Trace([*prefill("abc"), *prefill("dXf", step=1, start=3)])
    first = compare(alone, company).first
    assert (first.position, first.company.op, first.company.step) == (4, "mm", 1)


def test_decode_aligns_with_prefill():
    alone = Trace([*prefill("ab"), *prefill("c", step=1, start=2), *prefill("d", step=2, start=3)])
    company = Trace(prefill("abcX"))
    first = compare(alone, company).first
    assert (first.position, first.alone.shape[0], first.company.shape[0]) == (3, 1, 4)


def test_a_position_computed_twice_is_compared_twice():
    alone = Trace(prefill("abc"))
    company = Trace([*prefill("abc"), *prefill("aXc", step=5)])
    assert compare(alone, company).first.position == 1


def test_a_position_that_one_side_did_not_compute_is_left_out():
    alone = Trace(prefill("abcd"))
    company = Trace(prefill("cd", start=2))
    found = compare(alone, company)
    assert found.first is None and found.compared == 4


def test_another_path_is_reported_by_the_ops_of_one_side():
    alone = Trace([call("gemm", 0, "a"), call(MODULE, 0, "b")])
    company = Trace([call("half", 0, "x"), call("half", 0, "y"), call("add", 0, "z"), call(MODULE, 0, "X")])
    first = compare(alone, company).first
    assert first.company.op == MODULE
    assert [c.op for c in first.only_alone] == ["gemm"]
    assert [c.op for c in first.only_company] == ["half", "half", "add"]


def test_another_width_is_another_op():
    alone = Trace([call("pow", 0, "a", width=8), call("mean", 0, "m")])
    company = Trace([call("pow", 0, "b", width=4), call("mean", 0, "m")])
    assert compare(alone, company).first is None


def test_execution_order_holds_across_phases():
    alone = Trace([call("mm", 0, "a"), call("draw", 0, "t", phase=SAMPLE), call("gather", 0, "g", phase="logprobs")])
    company = Trace([call("mm", 0, "a"), call("draw", 0, "X", phase=SAMPLE), call("gather", 0, "X", phase="logprobs")])
    assert compare(alone, company).first.company.op == "draw"


def test_a_chain_stands_for_all_digests_before():
    first, other = digest("a") + digest("b") + digest("c"), digest("a") + digest("X") + digest("c")
    assert chain(first)[:2] == chain(other)[:2]
    assert chain(first)[2] != chain(other)[2] and chain(first)[3] != chain(other)[3]


def test_names_of_kernels_are_cut_to_what_tells_them_apart():
    fill = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int> >(int)"
    names = ["_tile", fill, "Memcpy DtoD (Device -> Device)", "x" * 200, "_row_sum", "_sort"]
    assert kernels(names) == (
        f"_tile + vectorized_elementwise_kernel<4, FillFunctor<int> >(int) + {'x' * 90}... and 2 more"
    )
    assert kernels(["Memcpy DtoD (Device -> Device)"]) == "Memcpy DtoD (Device -> Device)"
    assert kernels([]) == ""
