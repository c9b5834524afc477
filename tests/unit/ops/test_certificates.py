"""Certificates on disk: a file is valid only if it is complete, unedited, and made for exactly the asked key."""

import json

import msgspec
import pytest
import torch

from bi_patch.errors import CertificateFailed
from bi_patch.ops import bits, certificates
from bi_patch.ops.certificates import Certificate, Evidence, Key, Tally

KEY = Key("cpu.linear", "N=8 K=8 bfloat16", "a CPU, 2 threads", "torch 2.13", "kernels 1")


def certificate(key=KEY):
    evidence = Evidence([1, 2], 48, 0)
    return Certificate(key, "library", True, [1, 2], evidence, 0.1, "2026-01-01", {"library": {"1": 2.0}})


def test_kept_and_found_again(tmp_path):
    made = []

    def make():
        made.append(1)
        return certificate()

    first = certificates.obtain(tmp_path, KEY, make)
    assert certificates.obtain(tmp_path, KEY, make) == first == certificate()
    assert made == [1]
    assert [c for _, c in certificates.every(tmp_path)] == [certificate()]


def test_a_tally_passes_where_nothing_differs_and_says_what_differed_first():
    tally = Tally([1, 60])
    tally.add(8, 0, "nothing")
    made = tally.certificate(KEY, "tiles")
    assert made.passed and made.passed_rows == [1, 60] and made.evidence == Evidence([1, 60], 8, 0)
    tally.add(480, 3, "M=60: 3 of 480")
    tally.add(8, 1, "another")
    made = tally.certificate(KEY, "tiles")
    assert not made.passed and made.passed_rows == [] and (made.key, made.route) == (KEY, "tiles")
    assert made.evidence == Evidence([1, 60], 496, 4, "M=60: 3 of 480") and made.seconds >= 0


def test_preferred_algorithms_are_read_back_by_rows(tmp_path):
    made = msgspec.structs.replace(certificate(), algorithms=[[1, 2]], preferred={1: [1, 2], 192: [3, 4]})
    certificates.save(tmp_path, made)
    assert certificates.load(tmp_path, KEY) == made


@pytest.mark.parametrize("field", ["operation", "problem", "device", "libraries", "kernels"])
def test_any_change_of_the_key_makes_it_anew(tmp_path, field):
    certificates.save(tmp_path, certificate())
    assert certificates.load(tmp_path, msgspec.structs.replace(KEY, **{field: "other"})) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-40]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text(file.read_text().replace('"passed": true', '"passed": false')),
        lambda file: file.write_text(json.dumps(json.loads(file.read_text())["certificate"])),
        lambda file: file.unlink(),
    ],
    ids=["cut short", "empty", "edited", "unsealed", "gone"],
)
def test_a_spoilt_file_is_not_believed(tmp_path, spoil):
    certificates.save(tmp_path, certificate())
    file = certificates.path(tmp_path, KEY)
    spoil(file)
    assert certificates.load(tmp_path, KEY) is None
    assert certificates.obtain(tmp_path, KEY, certificate) == certificate()
    assert certificates.load(tmp_path, KEY) == certificate()


def test_a_file_under_another_keys_name_is_not_believed(tmp_path):
    other = msgspec.structs.replace(KEY, problem="N=16 K=8 bfloat16")
    certificates.save(tmp_path, certificate())
    certificates.path(tmp_path, KEY).rename(certificates.path(tmp_path, other))
    assert certificates.load(tmp_path, other) is None


def test_writing_leaves_no_temporary_files(tmp_path):
    for _ in range(3):
        certificates.save(tmp_path, certificate())
    assert [f.name for f in (tmp_path / "certificates").iterdir()] == [certificates.path(tmp_path, KEY).name]


def failing(key=KEY):
    evidence = Evidence([1, 2], 48, 3, "M=1: 3 of 48")
    return msgspec.structs.replace(certificate(key), passed=False, passed_rows=[2], evidence=evidence)


@pytest.fixture
def warnings(monkeypatch):
    """The log's warnings, one line each."""
    said = []
    monkeypatch.setattr(certificates, "_warned", set())
    monkeypatch.setattr(certificates._log, "warning", lambda text, *values: said.append(text % values))
    return said


def test_a_failure_is_said_once_with_what_serves(tmp_path, warnings):
    for _ in range(2):
        assert not certificates.obtain(tmp_path, KEY, failing, instead="the bundled GEMM").passed
    assert warnings == [
        "bi_patch: the certificate of cpu.linear N=8 K=8 bfloat16 failed for 1 of 2 numbers of rows (M=1: 3 of 48); "
        "the bundled GEMM serves instead"
    ]
    other = msgspec.structs.replace(KEY, problem="N=16")
    certificates.obtain(tmp_path, other, lambda: failing(other), instead="the bundled GEMM")
    assert len(warnings) == 2 and "N=16" in warnings[1]


def test_what_passes_says_nothing(tmp_path, warnings):
    certificates.obtain(tmp_path, KEY, certificate, instead="the bundled GEMM")
    certificates.require([certificate()])
    assert warnings == []


def test_an_error_is_a_failure_that_the_next_start_forgets(tmp_path, warnings):
    def make():
        raise MemoryError("no room")

    made = certificates.obtain(tmp_path, KEY, make, instead="the bundled GEMM")
    assert (made.key, made.passed, made.passed_rows, made.evidence.rows) == (KEY, False, [], [])
    assert made.evidence.first == "MemoryError: no room" and "failed (MemoryError: no room); the" in warnings[0]
    assert certificates.every(tmp_path) == []
    assert certificates.obtain(tmp_path, KEY, certificate).passed


def test_an_interrupt_is_no_failure(tmp_path):
    def make():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certificates.obtain(tmp_path, KEY, make, instead="the bundled GEMM")


def test_a_certificate_that_is_made_anew_does_not_come_from_disk(tmp_path):
    certificates.save(tmp_path, certificate())
    assert not certificates.obtain(tmp_path, KEY, failing, anew=True).passed
    assert not certificates.load(tmp_path, KEY).passed


def test_without_another_kernel_every_failure_is_named(tmp_path):
    other = msgspec.structs.replace(KEY, operation="cpu.norm")
    with pytest.raises(CertificateFailed) as failed:
        certificates.require([certificate(), failing(), failing(other)])
    text = str(failed.value)
    for part in ("2 operation(s)", "cpu.linear N=8 K=8 bfloat16: M=1: 3 of 48", "cpu.norm", "bi-patch certify"):
        assert part in text


def test_time_counts_once_for_the_innermost_kind_and_workers_start_side_by_side(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(certificates.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(certificates, "_seconds", {})
    monkeypatch.setattr(certificates, "_obtained", {})
    monkeypatch.setattr(certificates, "_failed", {})

    def make(seconds, error=None):
        now[0] += seconds
        if error:
            raise error
        return certificate()

    with certificates.clock("other"):
        now[0] += 1
        certificates.obtain(tmp_path, KEY, lambda: make(2))
        with certificates.clock("compile"):
            now[0] += 4
        certificates.obtain(tmp_path, KEY, lambda: make(8, RuntimeError("none")), anew=True)
    kind = KEY.operation.split(".")[1]
    held = certificates.counts()
    assert certificates.failed() == [f"{KEY.operation} {KEY.problem}"]
    certificates.obtain(tmp_path, KEY, certificate)
    assert certificates.failed() == []
    assert held.seconds == {"other": 1.0, kind: 10.0, "compile": 4.0}
    both = held + certificates.Counts(1, 0, 1, {"other": 3.0, "norm": 0.04})
    assert both.seconds == {"other": 3.0, kind: 10.0, "compile": 4.0, "norm": 0.04}
    assert both.words().endswith(f"in 17.0 s ({kind} 10.0, compile 4.0, other 3.0)")


def test_counts_of_the_device_are_read_once_and_named_in_order():
    tally = certificates.Tally([1, 2])
    for outputs, wrong in ((10, 0), (20, 3), (30, 5)):
        tally.add_later(
            outputs, bits.count(torch.arange(outputs) < wrong, torch.zeros(outputs) > 0), "%d differ".__mod__
        )
    made = tally.certificate(KEY, "kept")
    assert not made.passed and made.evidence == certificates.Evidence([1, 2], 60, 8, "3 differ")
