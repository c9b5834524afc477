"""The result of checking one source."""

import msgspec


class Problem(msgspec.Struct, frozen=True):
    """One problem that a check found. kind: release, series, patch, close, anchor or copies."""

    kind: str
    message: str
    seam: str = ""
    target: str = ""
    file: str = ""
    diff: str = ""


class Report(msgspec.Struct):
    """What a check found in one source. base: the release whose series was checked; differs for an unknown release."""

    source: str
    release: str
    base: str
    patches: int = 0
    applied: int = 0
    reversed: int = 0
    seams: int = 0
    closed: int = 0
    anchors: int = 0
    matched: int = 0
    problems: list[Problem] = []
    package: str = "vllm"

    @property
    def ok(self) -> bool:
        return not self.problems
