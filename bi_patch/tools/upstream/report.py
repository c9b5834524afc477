"""What a check of one source found."""

import msgspec


class Problem(msgspec.Struct, frozen=True):
    """One thing that is not as it must be. kind: release, series, patch, close, anchor or copies."""

    kind: str
    message: str
    seam: str = ""
    target: str = ""
    file: str = ""
    diff: str = ""


class Report(msgspec.Struct):
    """What was found in one source. base: the release whose series was tried, if `release` is unknown."""

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
