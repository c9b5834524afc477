"""`bi-patch certify` shows counts first, then failed and corrupt certificates, and every certificate on demand."""

import json

import pytest

from bi_patch.ops import certificates
from bi_patch.ops.certificates import Certificate, Evidence, Key
from bi_patch.tools.cli import certify

MADE = [
    ("cpu.linear", "N=49152 K=576 bfloat16", "library", True, [1, 2, 3]),
    ("cpu.linear", "N=576 K=1536 bfloat16 bias", "library", False, [1]),
    ("cpu.linear", "N=576 K=1537 float32", "bundled", False, []),
    ("cuda.moe", "E=8 [red]N=3 and a problem that has more words than a line of 80 columns", "tiles", True, [1, 2, 3]),
]
FAILED = ("cpu.layer_norm", "hidden=576 [/bold]", "kept", False, [2])


@pytest.fixture
def keep(tmp_path):
    """keep(*certificates) writes the certificates to a cache folder and returns the folder."""

    def make(*made):
        for operation, problem, route, passed, rows in made:
            key = Key(operation, problem, "a CPU, 2 threads", "torch 2.13", "kernels 1")
            first = "" if passed else "3 rows: 4 elements differ"
            evidence = Evidence([1, 2, 3], 48000, 0 if passed else 4, first)
            certificates.save(tmp_path, Certificate(key, route, passed, rows, evidence, 0.25, "2026-01-01"))
        return tmp_path

    return make


def test_the_counts_come_first_and_each_certificate_on_demand(bi_patch, keep):
    folder = str(keep(*MADE))
    done = bi_patch("certify", BI_PATCH_CACHE=folder)
    assert done.returncode == 0, done.stderr
    first, second, _ = done.stdout.splitlines()
    assert first == (
        "4 certificates for 2 operations on this machine: 3 kernels certified "
        "(1 of them for some numbers of rows only), 1 replaced by a fixed-order kernel, 0 failed."
    )
    assert second == f"Folder: {folder}/certificates"
    done = bi_patch("certify", "--all", BI_PATCH_CACHE=folder)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()[4:]]
    assert len(lines) == 5 and lines[-1] == "Made for: a CPU, 2 threads; torch 2.13"
    assert lines[0] == (
        "certified cpu.linear N=49152 K=576 bfloat16 3 of 3 numbers of rows equal, 0 of 48,000 elements differ, "
        "kernel library, made 2026-01-01 in 0.25 s; the library serves no number of rows, kernels 1 the rest"
    )
    assert lines[1].startswith("certified in part cpu.linear") and lines[2].startswith("replaced cpu.linear")
    assert MADE[3][1] in lines[3]


def test_a_linear_says_for_which_rows_the_library_serves(bi_patch, tmp_path):
    key = Key("cpu.linear", "N=8 K=8 bfloat16", "a CPU", "torch 2.13", "bi_cpu-amx_bf16-1")
    times = {"library": {"1": 5.0, "3": 1.0}, "bundled": {"1": 2.0, "3": 2.0}}
    made = Certificate(key, "library", True, [1, 3], Evidence([1, 3], 64, 0, ""), 0.25, "2026-01-01", times)
    certificates.save(tmp_path, made)
    done = bi_patch("certify", "--all", BI_PATCH_CACHE=str(tmp_path))
    assert "the library serves M = 3, bi_cpu-amx_bf16-1 the rest" in " ".join(done.stdout.split()), done.stdout


def test_what_failed_or_is_corrupt_is_named_with_its_cure(bi_patch, keep):
    folder = keep(*MADE, FAILED)
    corrupt = folder / "certificates" / "cpu.linear-[red].json"
    corrupt.write_text("{")
    done = bi_patch("certify", BI_PATCH_CACHE=str(folder))
    assert done.returncode == 1
    first, *_, failed, last = done.stdout.splitlines()
    assert first.endswith(" 1 failed; 1 corrupt file.")
    assert failed == (
        "failed  cpu.layer_norm  hidden=576 [/bold]: 3 rows: 4 elements differ; an engine that needs it stops with "
        "CertificateFailed"
    )
    assert last == f"corrupt  {corrupt}: not used; an engine that needs this certificate makes it again"
    report = json.loads(bi_patch("certify", "--json", BI_PATCH_CACHE=str(folder)).stdout)
    assert report["corrupt"] == [corrupt.name] and len(report["certificates"]) == 5
    assert report["folder"] == str(folder / "certificates")


@pytest.mark.parametrize("spoilt", [FAILED, None], ids=["failed", "corrupt"])
def test_either_alone_is_exit_code_1(bi_patch, keep, spoilt):
    folder = keep(*MADE, *filter(None, [spoilt]))
    if spoilt is None:
        (folder / "certificates" / "cut.json").write_text("")
    assert bi_patch("certify", BI_PATCH_CACHE=str(folder)).returncode == 1


def test_no_certificates_is_said_and_no_error(bi_patch, tmp_path):
    done = bi_patch("certify", BI_PATCH_CACHE=str(tmp_path))
    assert done.returncode == 0
    assert done.stdout.startswith(f"No certificates in {tmp_path}/certificates: an armed engine makes them")


def test_a_terminal_has_one_line_of_80_columns_a_certificate(terminal, keep):
    folder = keep(*MADE)
    made = [certificate for _, certificate in certificates.every(folder)]
    certify._print(folder, made, [], True)
    lines = [line for line in terminal() if " cpu.linear " in line or " cuda.moe " in line]
    assert len(lines) == 4 and all(len(line) <= 80 for line in lines) and any(line.endswith("…") for line in lines)
    assert all(len(line) <= 80 or line.startswith("Folder: ") for line in terminal())


def test_algorithms_that_passed_serve_in_part():
    key = Key("cuda.linear", "p", "d", "l", "k")
    made = Certificate(key, "cublaslt", False, [], Evidence([1], 8, 2), 0.1, "2026-01-01")
    assert certify.state(made) == certify.REPLACED
    made = Certificate(key, "cublaslt", False, [], Evidence([1], 8, 2), 0.1, "2026-01-01", algorithms=[[1, 2]])
    assert certify.state(made) == certify.PARTLY
