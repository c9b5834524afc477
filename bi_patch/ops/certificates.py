"""Certificates: recorded evidence that a kernel keeps an order, kept on disk and made again when anything changes.

One JSON file a certificate, named by the digest of its key and sealed with a digest of its contents: a file that is
cut short, edited, or made for another key is not believed. Writing replaces the file in one step.

A certificate fails in one way, on every platform and for every operation:

- A certificate fails when an element differs, or when making the certificate raises an error.
- Where another kernel keeps the order by construction, that kernel serves. The log has one warning, which names the
  operation, the problem and the first difference or the error (`obtain`).
- Where there is no other kernel, the engine stops with CertificateFailed, which names every failure (`require`).
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from bi_patch import files
from bi_patch.errors import CertificateFailed

_log = logging.getLogger("vllm.bi_patch")
_warned: set[str] = set()


class Key(msgspec.Struct, frozen=True):
    """What evidence is valid for. Any change makes the certificate anew.

    operation: e.g. `cpu.linear`. problem: sizes, dtypes, bias. device: model, instruction set, threads.
    libraries: versions of everything whose kernels take part. kernels: digest of the bundled kernels. data: what was
    compared, where its choice is a part of the evidence.
    """

    operation: str
    problem: str
    device: str
    libraries: str
    kernels: str
    data: str = ""

    def digest(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class Evidence(msgspec.Struct, frozen=True):
    """rows: every M that was compared. compared, differing: output elements, bitwise. first: the first difference."""

    rows: list[int]
    compared: int
    differing: int
    first: str = ""


class Certificate(msgspec.Struct, frozen=True):
    """route: the kernel that the evidence is about. passed_rows: the compared M for which every element was equal.

    seconds: what making it took. microseconds: time a call by route and M, where it was measured. algorithms: the
    library's algorithms that passed, where it has several for a problem. preferred: which of the library's algorithms
    was the fastest at each M that was timed, where it was measured; it serves only if it is one of `algorithms`.
    """

    key: Key
    route: str
    passed: bool
    passed_rows: list[int]
    evidence: Evidence
    seconds: float
    made: str
    microseconds: dict[str, dict[str, float]] = {}
    algorithms: list[list[int]] = []
    preferred: dict[int, list[int]] = {}


class Tally:
    """Comparisons of one route, which passes where nothing differs. Counts from its making, in seconds too."""

    def __init__(self, rows: list[int]):
        self.rows, self.compared, self.differing, self.first = rows, 0, 0, ""
        self._start = time.perf_counter()

    def add(self, outputs: int, wrong: int, said: str) -> None:
        """`wrong` of so many outputs differ; `said` is kept for the first that do."""
        self.compared += outputs
        self.differing += wrong
        if wrong and not self.first:
            self.first = said

    def certificate(self, key: Key, route: str) -> Certificate:
        passed = self.differing == 0
        return Certificate(
            key=key,
            route=route,
            passed=passed,
            passed_rows=self.rows if passed else [],
            evidence=Evidence(self.rows, self.compared, self.differing, self.first),
            seconds=round(time.perf_counter() - self._start, 3),
            made=today(),
        )


class _Sealed(msgspec.Struct):
    seal: str
    certificate: Certificate


def path(folder: Path, key: Key) -> Path:
    return folder / "certificates" / f"{key.operation}-{key.digest()[:32]}.json"


def load(folder: Path, key: Key) -> Certificate | None:
    """The certificate for `key`, or None where there is none that can be believed."""
    sealed = files.read_json(path(folder, key), _Sealed)
    if sealed is None or sealed.certificate.key != key or sealed.seal != _seal(sealed.certificate):
        return None
    return sealed.certificate


def save(folder: Path, certificate: Certificate) -> None:
    files.write_json(path(folder, certificate.key), _Sealed(_seal(certificate), certificate))


def obtain(
    folder: Path, key: Key, make: Callable[[], Certificate], *, instead: str = "", anew: bool = False
) -> Certificate:
    """The certificate on disk, or a new one from `make`, which is then kept.

    An error in `make` is a failed certificate, which is not kept: the next start tries again. instead: the kernel that
    serves where the certificate fails, for the log's warning; without one, hand the certificate to `require`.
    anew: do not believe the disk.
    """
    certificate = None if anew else load(folder, key)
    if certificate is None:
        certificate = _made(folder, key, make)
    if not certificate.passed and instead and key.digest() not in _warned:
        _warned.add(key.digest())
        rows, passed = len(certificate.evidence.rows), len(certificate.passed_rows)
        some = f" for {rows - passed} of {rows} numbers of rows" if passed else ""
        _log.warning(
            "bi_patch: the certificate of %s %s failed%s (%s); %s serves instead",
            *(key.operation, key.problem, some, certificate.evidence.first, instead),
        )
    return certificate


def require(made: Iterable[Certificate]) -> None:
    """For operations that no other kernel can serve: raise CertificateFailed, naming each that failed."""
    failed = [certificate for certificate in made if not certificate.passed]
    if failed:
        lines = "\n".join(f"  {c.key.operation} {c.key.problem}: {c.evidence.first}" for c in failed)
        raise CertificateFailed(
            f"{len(failed)} operation(s) change a row's bits with the number of rows on this machine, or could not be "
            f"compared:\n{lines}\nThere is no bundled kernel for them. Please report this with the output of "
            "`bi-patch certify`; BI_PATCH=0 runs without bi_patch"
        )


def _made(folder: Path, key: Key, make: Callable[[], Certificate]) -> Certificate:
    start = time.perf_counter()
    try:
        certificate = make()
    except Exception as error:  # whatever it is, there is no evidence
        _log.debug("bi_patch: %s %s: no certificate", key.operation, key.problem, exc_info=True)
        said = str(error) or "no message"
        evidence = Evidence([], 0, 0, f"{type(error).__name__}: {said}")
        return Certificate(key, "", False, [], evidence, round(time.perf_counter() - start, 3), today())
    save(folder, certificate)
    return certificate


def every(folder: Path) -> list[tuple[Path, Certificate | None]]:
    """All certificates on disk with their files; None for a file that is not believed."""
    listed = []
    for file in sorted((folder / "certificates").glob("*.json")):
        sealed = files.read_json(file, _Sealed)
        good = sealed is not None and sealed.seal == _seal(sealed.certificate)
        listed.append((file, sealed.certificate if sealed is not None and good else None))
    return listed


def today() -> str:
    return time.strftime("%Y-%m-%d")


def _seal(certificate: Certificate) -> str:
    return hashlib.sha256(msgspec.json.encode(certificate)).hexdigest()
