"""Certificates on disk: believed only when whole, unedited, and made for exactly this key."""

import json

import msgspec
import pytest

from bi_patch.ops import certificates
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
