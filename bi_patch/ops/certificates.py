"""Certificates: recorded evidence that a kernel keeps an order. They are kept on disk and made again on any change.

Each certificate is one JSON file. Its name has the digest of the certificate's key; a seal holds the digest of its
contents. `load` ignores a file that is truncated, edited, or made for another key. `save` replaces the file atomically.

A certificate fails in one way, on every platform and for every operation:

- A certificate fails if an element differs, or if making the certificate raises an error.
- If another kernel keeps the order by construction, that kernel serves. `obtain` logs one warning, which names the
  operation, the problem, and the first difference or the error.
- If there is no other kernel, `require` raises CertificateFailed, which names every failure and stops the engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bi_patch import files
from bi_patch.errors import CertificateFailed

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("vllm.bi_patch")
_warned: set[str] = set()
_obtained: dict[str, tuple[bool, bool]] = {}  # by the key's digest: whether it passed, whether it was read from disk
_failed: dict[str, str] = {}  # by the key's digest: operation and problem
_seconds: dict[str, float] = {}  # by kind of work (`clock`)
_inside: list[float] = []  # for each running clock, the seconds of the clocks inside it


class Key(msgspec.Struct, frozen=True):
    """What a certificate is valid for. After any change, the certificate is made again.

    operation: e.g. `cpu.linear`. problem: sizes, dtypes, bias. device: model, instruction set, threads. libraries: the
    versions of all libraries whose kernels take part. kernels: the digest of the bundled kernels. data: which operands
    were compared; "" for an operation that has only one choice of operands.
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
    """What a comparison found.

    rows: every number of rows M that was compared. compared: the number of output elements that were compared bitwise.
    differing: how many of them differed. first: the first difference as text, or the error's text.
    """

    rows: list[int]
    compared: int
    differing: int
    first: str = ""


class Certificate(msgspec.Struct, frozen=True):
    """The evidence for one key.

    route: the kernel that the evidence is about. passed: whether every element was equal. passed_rows: the compared M
    for which every element was equal. seconds: the time that making the certificate took. made: the date, YYYY-MM-DD.
    microseconds: time per call, by kernel and M; empty if no call was timed. algorithms: the library's algorithms that
    passed; empty if the operation does not choose among algorithms. preferred: the library's fastest algorithm at each
    timed M. A preferred algorithm serves only if `algorithms` holds the same algorithm.
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


class Counts(msgspec.Struct, frozen=True):
    """Numbers of certificates, and the time that they took.

    cached: those that were read from disk, passed or failed. seconds: by kind of work, e.g. `linear`, with the time to
    read and to compile. Workers start side by side, so a sum of several workers has the seconds of the slowest.
    """

    passed: int = 0
    failed: int = 0
    cached: int = 0
    seconds: dict[str, float] = {}

    def __add__(self, other: Counts) -> Counts:
        kinds = self.seconds.keys() | other.seconds.keys()
        seconds = {kind: max(self.seconds.get(kind, 0.0), other.seconds.get(kind, 0.0)) for kind in sorted(kinds)}
        return Counts(self.passed + other.passed, self.failed + other.failed, self.cached + other.cached, seconds)

    def words(self) -> str:
        """For a log: the numbers, all seconds, and the kinds of work that took at least a twentieth of a second."""
        long = sorted(((s, kind) for kind, s in self.seconds.items() if s >= 0.05), reverse=True)
        kinds = f" ({', '.join(f'{kind} {s:.1f}' for s, kind in long)})" if long else ""
        return (
            f"certificates: {self.passed} passed, {self.failed} failed, {self.cached} of them from the cache, "
            f"in {sum(self.seconds.values()):.1f} s{kinds}"
        )


class Tally:
    """Counts the comparisons of one kernel and makes its certificate. Time counts from the tally's creation."""

    def __init__(self, rows: list[int]):
        self.rows, self.compared, self.differing, self.first = rows, 0, 0, ""
        self._start = time.perf_counter()
        self._waiting: list[tuple[int, torch.Tensor, Callable[[int], str]]] = []

    def add(self, outputs: int, wrong: int, said: str) -> None:
        """Count `outputs` compared elements, of which `wrong` differ. said: the text kept for the first difference."""
        self.compared += outputs
        self.differing += wrong
        if wrong and not self.first:
            self.first = said

    def add_later(self, outputs: int, wrong: torch.Tensor, said: Callable[[int], str]) -> None:
        """As `add`, for a count that the device has not computed yet (bits.count). The host waits once for all counts,
        in `certificate`. said: the text of a difference, from the number of elements that differ."""
        self._waiting.append((outputs, wrong, said))

    def certificate(self, key: Key, route: str) -> Certificate:
        if self._waiting:
            import torch

            counts = torch.stack([wrong for _, wrong, _ in self._waiting]).tolist()
            for (outputs, _, said), wrong in zip(self._waiting, counts, strict=True):
                self.add(outputs, wrong, said(wrong))
            self._waiting.clear()
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
    """The certificate for `key`, or None if `folder` has no valid file for `key`."""
    sealed = files.read_json(path(folder, key), _Sealed)
    if sealed is None or sealed.certificate.key != key or sealed.seal != _seal(sealed.certificate):
        return None
    return sealed.certificate


def save(folder: Path, certificate: Certificate) -> None:
    files.write_json(path(folder, certificate.key), _Sealed(_seal(certificate), certificate))


def obtain(
    folder: Path, key: Key, make: Callable[[], Certificate], *, instead: str = "", anew: bool = False
) -> Certificate:
    """The certificate for `key`: read from disk, or made by `make` and then saved.

    If `make` raises an error, the certificate fails and is not saved: the next start makes it again. instead: the name
    of the kernel that serves if the certificate fails, for the log's warning. Without `instead`, the caller hands the
    certificate to `require`. anew: make the certificate even if the disk has it.
    """
    with clock(key.operation.split(".", 1)[-1]):
        certificate = held = None if anew else load(folder, key)
        if certificate is None:
            certificate = _made(folder, key, make)
    _obtained[key.digest()] = certificate.passed, held is not None
    if certificate.passed:
        _failed.pop(key.digest(), None)
    else:
        _failed[key.digest()] = f"{key.operation} {key.problem}"
    if not certificate.passed and instead and key.digest() not in _warned:
        _warned.add(key.digest())
        rows, passed = len(certificate.evidence.rows), len(certificate.passed_rows)
        some = f" for {rows - passed} of {rows} numbers of rows" if passed else ""
        _log.warning(
            "bi_patch: the certificate of %s %s failed%s (%s); %s serves instead",
            *(key.operation, key.problem, some, certificate.evidence.first, instead),
        )
    return certificate


@contextlib.contextmanager
def clock(kind: str) -> Iterator[None]:
    """Count a block's time for `kind`, which `counts` tells. A block inside counts for its own kind alone."""
    start = time.perf_counter()
    _inside.append(0.0)
    try:
        yield
    finally:
        spent = time.perf_counter() - start
        _seconds[kind] = _seconds.get(kind, 0.0) + spent - _inside.pop()
        if _inside:
            _inside[-1] += spent


def counts() -> Counts:
    """The certificates that this process obtained, each counted once, and the time that they took."""
    passed = sum(good for good, _ in _obtained.values())
    seconds = {kind: round(spent, 3) for kind, spent in sorted(_seconds.items())}
    return Counts(passed, len(_obtained) - passed, sum(cached for _, cached in _obtained.values()), seconds)


def failed() -> list[str]:
    """The certificates that this process obtained and that failed: operation and problem."""
    return sorted(set(_failed.values()))


def require(made: Iterable[Certificate], cure: str = "") -> None:
    """Raise CertificateFailed if a certificate failed. Call this for operations that no other kernel can serve.

    cure: a sentence on what the user can try.
    """
    failed = [certificate for certificate in made if not certificate.passed]
    if failed:
        lines = "\n".join(f"  {c.key.operation} {c.key.problem}: {c.evidence.first}" for c in failed)
        raise CertificateFailed(
            f"On this machine, a row's bits change with the number of rows in {len(failed)} operation(s), or the "
            f"comparison failed:\n{lines}\nbi_patch has no bundled kernel for these operations. {cure}Please report "
            "this error with the output of `bi-patch certify`. Set BI_PATCH=0 to run without bi_patch"
        )


def _made(folder: Path, key: Key, make: Callable[[], Certificate]) -> Certificate:
    start = time.perf_counter()
    try:
        certificate = make()
    except Exception as error:  # after any error there is no evidence
        _log.debug("bi_patch: %s %s: no certificate", key.operation, key.problem, exc_info=True)
        said = str(error) or "no message"
        evidence = Evidence([], 0, 0, f"{type(error).__name__}: {said}")
        return Certificate(key, "", False, [], evidence, round(time.perf_counter() - start, 3), today())
    save(folder, certificate)
    return certificate


def every(folder: Path) -> list[tuple[Path, Certificate | None]]:
    """All certificate files in `folder`, each with its certificate, or with None if the file is not valid."""
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
