"""The results of locate on invented traces, and the tracer on a small torch module."""

import msgspec
import torch

from bi_patch.tools.verify import locate
from bi_patch.tools.verify.answers import Answer, Request
from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.instruments import Traced
from bi_patch.tools.verify.trace import FORWARD, MODULE, SAMPLE, WIDTH, Call, Rows, Trace, Tracer, digest_rows

SAME, OTHER = Answer([1, 2], [-1.0, -2.0]), Answer([1, 2], [-1.0, -2.5])
ALONE = Scenario([Request((1, 2, 3))])


def case(got=OTHER):
    return Case.of("batch size", "a prompt", ALONE, ALONE, SAME, got)


def call(op, value, m=1, seam="linear.cpu_dispatch", kernel=""):
    return Call(
        0, FORWARD, "model.layers.0.mlp", "Linear", op, 0, 0, value * WIDTH, (m, 4), (4, 1), "bfloat16", seam, kernel
    )


def traced(answer, *calls):
    return Traced(answer, Trace(list(calls)), {"linear.cpu_dispatch": "closed"})


def test_the_draw_of_a_part_of_a_streamed_input_is_named_by_its_own_seam():
    company = Scenario([Request((1, 2, 3), parts=((1, 1),))])
    sides = [
        Traced(
            answer,
            Trace([msgspec.structs.replace(call("aten.argmax", value), phase=SAMPLE)]),
            {"streamed.seeds": "closed"},
        )
        for answer, value in ((SAME, b"a"), (OTHER, b"b"))
    ]
    found = locate.judge(msgspec.structs.replace(case(), company=company), *sides)
    assert (found.op, found.seam, found.seam_status) == ("aten.argmax", "streamed.seeds", "closed")
    assert locate.judge(case(), *sides).seam == "linear.cpu_dispatch"
    layers = (traced(SAME, call("aten.mm", b"a")), traced(OTHER, call("aten.mm", b"b")))
    assert locate.judge(msgspec.structs.replace(case(), company=company), *layers).seam == "linear.cpu_dispatch"


def test_names_module_op_seam_rows_and_kernels():
    alone = traced(SAME, call("aten.mm", b"a", 1, kernel="gemv"))
    company = traced(OTHER, call("aten.mm", b"b", 64, kernel="gemm"))
    found = locate.judge(case(), alone, company)
    assert (found.module, found.op, found.seam, found.seam_status) == (
        "model.layers.0.mlp",
        "aten.mm",
        "linear.cpu_dispatch",
        "closed",
    )
    assert (found.m_alone, found.m_company, found.reproduced) == (1, 64, True)
    words = found.words()
    for part in ("layers.0.mlp", "aten.mm", "M=1 alone, M=64 in company", "gemv alone, gemm in company", "closed"):
        assert part in words


def test_a_fused_kernel_of_one_side_says_more_than_the_elementary_op_after_it():
    alone = traced(SAME, call("fault.all_reduce_norm", b"a", seam="communicator"), call("aten.pow", b"c"))
    company = traced(OTHER, call("aten.add", b"b"), call("aten.pow", b"d"))
    found = locate.judge(case(), alone, company)
    assert (found.op, found.seam) == ("fault.all_reduce_norm", "communicator")


def test_an_op_of_another_seam_than_the_modules_own_says_most():
    reduced = call("fault.all_reduce_norm", b"a", seam="communicator")
    alone = traced(SAME, reduced, call("norm", b"c"), call(MODULE, b"e"))
    company = traced(OTHER, call("add_norm", b"b"), call(MODULE, b"d"))
    found = locate.judge(case(), alone, company)
    assert (found.op, found.seam) == ("fault.all_reduce_norm", "communicator")
    assert found.only_company == ("add_norm",)


def test_inside_a_module_the_other_path_is_named():
    alone = traced(SAME, call("bi_cpu.gemm", b"a"), call(MODULE, b"c"))
    company = traced(OTHER, call("_C.onednn_mm", b"b"), call(MODULE, b"d"))
    found = locate.judge(case(), alone, company)
    assert found.op == "_C.onednn_mm" and found.only_alone == ("bi_cpu.gemm",)


def test_nothing_differs_again():
    same = traced(SAME, call("aten.mm", b"a"))
    assert locate.judge(case(), same, same) is None


def test_answers_that_differ_without_an_op_are_told():
    same = call("aten.mm", b"a")
    found = locate.judge(case(), traced(SAME, same), traced(OTHER, same))
    assert found.reproduced and "outside the model" in found.note


def test_an_op_that_differs_though_the_answers_do_not_is_told():
    found = locate.judge(case(), traced(SAME, call("aten.mm", b"a")), traced(SAME, call("aten.mm", b"b")))
    assert not found.reproduced and found.op == "aten.mm" and "equal this time" in found.note


def test_decode_is_compared_with_the_end_of_the_prompt():
    asked = Case.of("decode = prefill", "a prompt", ALONE, ALONE, SAME, SAME, "decode")
    prefilled = Answer([7], [-3.0], prompt_logprobs=[-9.0, -1.0, -2.0])
    assert locate.difference(asked, SAME, prefilled).differing == 0
    assert locate.difference(asked, OTHER, prefilled).differing == 1


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)

    def forward(self, x):
        return torch.relu_(self.second(self.first(x)) + 1)


def run(x, start, count, position=0, model=None):
    torch.manual_seed(0)
    model = model or Small()
    names = {id(m): name for name, m in model.named_modules()}
    tracer = Tracer(names, lambda module, path, op: "", lambda func, args: str(func))
    with (
        torch.inference_mode(),
        tracer.hooked(),
        tracer.phase(Rows(0, FORWARD, frozenset({x.shape[0]}), start, count, position)),
    ):
        model(x)
    return tracer.calls


def test_the_tracer_sees_ops_modules_and_in_place_results_of_the_rows():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    calls = run(x, 2, 3, position=10)
    found = [(c.module, c.op) for c in calls]
    assert ("first", MODULE) in found and ("second", MODULE) in found and ("model", MODULE) in found
    assert ("model", "aten.relu_") in found and ("model", "aten.add") in found
    assert all(c.position == 10 and c.rows == 3 and c.shape[0] == 5 for c in calls)


def test_unwritten_memory_is_no_difference():
    class Writes(torch.nn.Module):
        def forward(self, x):
            made = x.new_empty(len(x), 2), torch.empty_like(x), x.new_empty_strided((len(x), 2), (2, 1))
            return made[0].fill_(1) + x[:, :2]

    found = [call.op for call in run(torch.randn(3, 4), 0, 3, model=Writes())]
    assert "aten.add" in found and not any("empty" in op for op in found)


def test_only_a_changed_row_changes_its_digests():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    y = x.clone()
    y[4] += 1
    for before, after in zip(run(x, 0, 5), run(y, 0, 5), strict=True):
        assert before.digests[: 4 * WIDTH] == after.digests[: 4 * WIDTH]
    assert run(x, 4, 1)[0].digest(0) != run(y, 4, 1)[0].digest(0)


def test_digests_are_of_bits():
    zeros = torch.tensor([[0.0], [-0.0]])
    assert digest_rows(zeros)[:WIDTH] != digest_rows(zeros)[WIDTH:]
    assert digest_rows(torch.arange(4)[::2]) == digest_rows(torch.tensor([0, 2]))
    assert len(digest_rows(torch.empty(3, 0))) == 3 * WIDTH
