"""Certificates of experts' products with packed weights, without a GPU: which forms serve after them."""

import pytest
import torch

from bi_patch.errors import CertificateFailed
from bi_patch.kernels import packing
from bi_patch.kernels.cuda import packed
from bi_patch.ops import certificates
from bi_patch.ops.cuda import linear, machine, packed_experts
from bi_patch.ops.zero_sums import cancelling
from bi_patch.tools.cli import certify

PROBLEM = packed_experts.Problem(256, 128, torch.bfloat16, False, 128, False)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """Make this process look as if it had certified nothing and had a Hopper GPU."""
    for name in ("device", "libraries"):
        monkeypatch.setattr(machine, name, lambda: "none")
    monkeypatch.setattr(machine, "kernels_digest", lambda kind="triton": kind)
    monkeypatch.setattr(machine, "shared_memory", lambda: 227 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(packed_experts, "_able", {})
    monkeypatch.setattr(certificates, "_warned", set())


def comparisons(monkeypatch, wrong):
    """Let the forms with these numbers differ in 7 outputs for 9 tokens. Returns what is compared."""
    made = []

    class Trial:
        def __init__(self, problem):
            assert problem.n == PROBLEM.n

        def differing(self, number, m):
            made.append((number, m))
            return torch.tensor(7 * (number in wrong and m == 9))

    monkeypatch.setattr(packed_experts, "_Trial", Trial)
    return made


def test_every_form_is_compared_once_and_serves(monkeypatch, tmp_path):
    made = comparisons(monkeypatch, ())
    (first,) = packed_experts.certify([PROBLEM, PROBLEM], 64, tmp_path)
    (again,) = packed_experts.certify([PROBLEM], 8192, tmp_path)
    forms = len(packed.FORMS_OF_EXPERTS)
    assert first == again and first.passed and len(made) == forms * len(packed_experts._COMPARED)
    assert first.evidence.compared == forms * 2 * 3 * sum(packed_experts._COMPARED) * PROBLEM.n
    served = {packed_experts.form(PROBLEM, ids, 128) for ids in range(1, 20000, 7)}
    assert served <= set(packed.FORMS_OF_EXPERTS)


def test_a_form_that_differs_does_not_serve(monkeypatch, tmp_path):
    usual = packed.form_of_experts(8, 128, PROBLEM.n, PROBLEM.k)
    number = packed.FORMS_OF_EXPERTS.index(usual)
    comparisons(monkeypatch, {number})
    (certificate,) = packed_experts.certify([PROBLEM], 64, tmp_path)
    assert not certificate.passed and [number] not in certificate.algorithms
    assert "9 tokens: 7 outputs of Form" in certificate.evidence.first and 9 not in certificate.passed_rows
    assert packed_experts.form(PROBLEM, 8, 128) != usual


def test_no_engine_starts_without_a_form(monkeypatch, tmp_path):
    comparisons(monkeypatch, set(range(len(packed.FORMS_OF_EXPERTS))))
    with pytest.raises(CertificateFailed, match="cuda.packed_products experts N=256 K=128 int4 .*9 tokens"):
        packed_experts.certify([PROBLEM], 64, tmp_path)
    (failed,) = [one for _, one in certificates.every(tmp_path)]
    assert certify.state(failed) == certify.FAILED
    monkeypatch.setattr(machine, "shared_memory", lambda: 1 << 10)
    with pytest.raises(CertificateFailed, match="this device runs no form"):
        packed_experts.certify([PROBLEM._replace(group=64)], 64, tmp_path)


def test_forms_are_compiled_ahead_unless_there_is_a_certificate(monkeypatch, tmp_path):
    prepared, rehearsed = [], []
    monkeypatch.setattr(packed, "prepare", lambda *given: prepared.append(given))
    monkeypatch.setattr(linear, "bundled", lambda x, weight, bias, agree: rehearsed.append((x.shape, weight.shape)))

    class Ahead:
        work = rehearse = staticmethod(lambda call: call())

    packed_experts.rehearse(PROBLEM, 64, tmp_path, Ahead())
    wanted = [(form, 128, False, torch.bfloat16, 0, True, False, False) for form in packed.FORMS_OF_EXPERTS]
    assert prepared == wanted and rehearsed == [((512, 128), (256, 128))]
    comparisons(monkeypatch, ())
    packed_experts.certify([PROBLEM], 64, tmp_path)
    packed_experts.rehearse(PROBLEM, 64, tmp_path, Ahead())
    assert prepared == wanted


def test_a_certificate_names_the_kernels_in_triton_and_in_cuda():
    from bi_patch.ops import row_checks
    from bi_patch.ops.cuda import packed_linear, rows

    dense = packed_linear.Problem(256, 128, torch.bfloat16, False, 4, 128, False)
    check = row_checks.RowCheck("cuda.norm", "RMSNorm 64 bfloat16", row_checks.FEW, None, None)
    keys = packed_experts._key(PROBLEM), packed_linear._key(dense, 8), rows._key(check, "vllm 1")
    assert [key.kernels for key in keys] == ["triton cuda"] * 3


def test_floats_have_a_problem_of_their_own(monkeypatch, tmp_path):
    problem = packed_experts.Problem(256, 2880, torch.bfloat16, True, 32, False, True)
    assert str(problem) == "experts N=256 K=2880 e2m1 groups of 32 bfloat16 bias"
    assert problem.tail and not problem._replace(k=2944).tail and not PROBLEM.tail
    prepared = []
    monkeypatch.setattr(packed, "prepare", lambda *given: prepared.append(given))
    monkeypatch.setattr(linear, "bundled", lambda *_: None)

    class Ahead:
        work = rehearse = staticmethod(lambda call: call())

    packed_experts.rehearse(problem, 64, tmp_path, Ahead())
    assert {given[1:] for given in prepared} == {(32, False, torch.bfloat16, 0, True, True, True)}
    made = comparisons(monkeypatch, ())
    packed_experts.certify([problem], 64, tmp_path)
    assert made and packed_experts.form(problem, 8, 32) in packed.FORMS_OF_EXPERTS


def test_floats_with_scales_have_a_number_of_each_expert(monkeypatch, tmp_path):
    problem = packed_experts.Problem(256, 2048, torch.bfloat16, False, 16, False, True)
    assert str(problem) == "experts N=256 K=2048 e2m1 groups of 16 bfloat16" and problem.whole and not problem.tail
    assert not problem._replace(group=32).whole and not PROBLEM.whole
    made = comparisons(monkeypatch, ())
    packed_experts.certify([problem], 64, tmp_path)
    assert made and packed_experts.form(problem, 8, 128) in packed.FORMS_OF_EXPERTS
    generator = torch.Generator().manual_seed(1)
    one, bias = packed_experts._drawn(problem, torch.randperm(problem.k, generator=generator), generator)
    assert one.floats and one.group == 16 and one.scale.shape == (128, 256) and bias is None
    wholes = packed_experts._WHOLES
    assert len(set(wholes)) == len(wholes) == packed_experts._EXPERTS  # another expert's number shows


@pytest.mark.parametrize("bias", [False, True])
def test_half_of_the_compared_sums_of_floats_are_zero(bias):
    problem = packed_experts.Problem(32, 160, torch.bfloat16, bias, 32, False, True)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(problem.k, generator=generator)
    one, added = packed_experts._drawn(problem, order, generator)
    assert one.shape == (32, 256) and one.floats and one.scale.shape == (8, 32) and one.whole is None
    assert (added is not None) == bias and (added is None or not added[::2].any() and added[1::2].all())
    drawn = {}
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(packing, "pack_float_experts", lambda q, e: drawn.update(q=q, e=e) or one)
        packed_experts._drawn(problem, order, torch.Generator().manual_seed(2))
    value = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[drawn["q"][0].long() & 7] * torch.where(drawn["q"][0] > 7, -1, 1)
    weight = value * torch.exp2(drawn["e"][0].float() - 127).repeat_interleave(32, 1)
    x = cancelling(5, order, 1, generator, torch.bfloat16)
    sums = x.double() @ weight.double().T
    assert not sums[:, ::2].any() and sums[:, 1::2].all()
