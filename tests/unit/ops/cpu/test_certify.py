"""Certificates of operations that keep the library's kernel, on CPU."""

import os
from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import CertificateFailed
from bi_patch.ops import certificates
from bi_patch.ops.cpu import certify, machine, rows
from bi_patch.ops.row_checks import ROWS, RowCheck


@pytest.fixture(autouse=True)
def kernels(cache):
    machine.load_kernels(cache)


def test_an_operation_that_varies_with_rows_stops_the_engine(tmp_path):
    def mean_by_rows(x):
        halves = x.float().chunk(2 if x.shape[0] > 16 else 1, dim=-1)
        return (sum(h.cumsum(-1)[..., -1] for h in halves),)

    rows.register(
        RowCheck("test.mean", "by rows", ROWS, lambda m, g: (torch.randn(m, 999, generator=g),), mean_by_rows)
    )
    with pytest.raises(CertificateFailed, match=r"test.mean by rows: \d+ rows: \d+ elements differ"):
        certify.certify(tmp_path, "test 1")
    certify.certify(tmp_path, "test 1")  # the failed operation is no longer registered


def test_few_rows_are_taken_at_many_places():
    assert rows._places(1, 1025)[:2] == [0, 33] and rows._places(1, 1025)[-1] == 1024
    assert len(rows._places(1, 1025)) == len(rows._places(7, 1025)) == rows._PLACES
    assert rows._places(511, 1025) == [0, 257, 514] and rows._places(1025, 1025) == [0]
    assert rows._places(1, 3) == [0, 1, 2]


def test_an_operation_that_reduces_rows_alone_passes(tmp_path):
    rows.register(
        RowCheck(
            "test.softmax", "4096", ROWS, lambda m, g: (torch.randn(m, 4096, generator=g),), lambda x: (x.softmax(-1),)
        )
    )
    (certificate,) = certify.certify(tmp_path, "test 1")
    assert certificate.passed and certificate.evidence.compared > 0


def test_every_failure_is_named_at_once_with_what_to_do(tmp_path):
    def broken(x):
        raise RuntimeError("no kernel")

    def short(x):
        return (x[:, 0] + len(x),)

    for name, run in (("broken", broken), ("short", short)):
        rows.register(RowCheck(f"test.{name}", "8", (1, 2), lambda m, g: (torch.randn(m, 8, generator=g),), run))
    with pytest.raises(CertificateFailed) as failed:
        certify.certify(tmp_path, "test 1")
    for part in ("2 operation(s)", "test.broken 8: RuntimeError: no kernel", "test.short 8: 1 rows", "BI_PATCH=0"):
        assert part in str(failed.value)
    assert [c.key.operation for _, c in certificates.every(tmp_path)] == ["test.short"]  # an error leaves no evidence


def test_quantized_experts_are_named_with_what_to_do(tmp_path):
    config = SimpleNamespace(
        hidden_dim=8, num_experts=4, experts_per_token=2, in_dtype=torch.bfloat16, intermediate_size_per_partition=8
    )
    layer = SimpleNamespace(w13_weight=torch.zeros(4, 16, 8, dtype=torch.int8))
    rows.register_moe(SimpleNamespace(moe_config=config), layer)
    with pytest.raises(CertificateFailed, match="torch.int8 weights for torch.bfloat16 rows; use unquantized weights"):
        certify.certify(tmp_path, "test 1")


def test_the_library_is_a_part_of_the_key(tmp_path):
    def register():
        rows.register(
            RowCheck("test.copy", "8", (1, 2), lambda m, g: (torch.randn(m, 8, generator=g),), lambda x: (x,))
        )

    for library in ("test 1", "test 2"):
        register()
        (certificate,) = certify.certify(tmp_path, library)
        assert certificate.key.libraries == f"{library}, torch {torch.__version__}"
    assert len(certificates.every(tmp_path)) == 2


def test_a_variable_that_chooses_the_librarys_kernels_is_a_part_of_the_key(monkeypatch):
    """oneDNN with fewer instructions runs other kernels: a certificate of the usual ones does not hold for them."""
    plain = machine.libraries("test 1")
    assert plain == f"test 1, torch {torch.__version__}"
    for name, value in (("ONEDNN_MAX_CPU_ISA", "AVX2"), ("DNNL_DEFAULT_FPMATH_MODE", "BF16"), ("MKL_CBWR", "AVX2")):
        monkeypatch.setenv(name, value)
        assert f"{name}={value}" in machine.libraries("test 1")


def test_other_numbers_of_threads_are_tried_and_put_back(tmp_path):
    own = torch.get_num_threads()

    def by_threads(x):
        return (x + (torch.get_num_threads() == 3),)

    rows.register(RowCheck("test.threads", "8", (1, 2), lambda m, g: (torch.randn(m, 8, generator=g),), by_threads))
    with pytest.raises(CertificateFailed, match=r"test.threads 8: 1 rows: \d+ elements differ"):
        certify.certify(tmp_path, "test 1")
    assert torch.get_num_threads() == own


def test_other_numbers_of_threads_are_tried_in_a_worker_of_vllm(tmp_path, monkeypatch):
    """Such a worker replaces torch.set_num_threads by a function that does nothing. The threads that it pinned stay."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    seen = set()

    def note(x):
        seen.add(torch.get_num_threads())
        return (x.exp(),)

    torch.randn(1000, 1000).exp()  # starts the pool
    pool = set(os.listdir("/proc/self/task"))
    rows.register(RowCheck("test.pool", "8", (1, 2), lambda m, g: (torch.randn(m, 99999, generator=g),), note))
    with torch.inference_mode():
        certify.certify(tmp_path, "test 1")
    assert seen == {1, 3, torch.get_num_threads()}
    torch.randn(1000, 1000).exp()
    assert pool <= set(os.listdir("/proc/self/task"))


def test_a_number_of_threads_that_cannot_be_set_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._C, "set_num_threads", lambda number: None)
    rows.register(RowCheck("test.stuck", "8", (1, 2), lambda m, g: (torch.randn(m, 8, generator=g),), lambda x: (x,)))
    with pytest.raises(CertificateFailed, match="PyTorch's number of threads stays"):
        certify.certify(tmp_path, "test 1")


def test_layer_norms_and_routers_pass(tmp_path):
    scale = torch.rand(24)

    def router(hidden, logits, input_ids):  # it reads hidden states, which are wider than the logits
        weights, ids = (logits.float() * (hidden * scale).float().amax(-1, keepdim=True)).softmax(-1).topk(2)
        return weights / weights.sum(-1, keepdim=True), ids

    rows.register_layer_norm(torch.nn.LayerNorm(96), (96,))
    rows.register_router(router, "softmax, renormalized", 8, 2, 24, torch.bfloat16)
    made = certify.certify(tmp_path, "test 1")
    assert [c.key.operation for c in made if c.passed] == ["cpu.norm", "cpu.routing", "cpu.routing"]
    assert made[-1].key.problem == "softmax, renormalized E=8 k=2 hidden=24 bfloat16"
