"""Which of the algorithms that cuBLASLt offers serves a number of rows: by time, among those that are certified.

The library orders its offers by its own estimate, and its first is not always the fastest. Offers are timed at a few M;
the fastest kind there also serves the M below it, down to the timed M before, since they need about as many tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bi_patch.ops.cuda.cublaslt import Algorithm, Kind

# Where the number of tiles of common sizes changes.
_TIMED = (1, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 768, 1024, 1536, 2048, 4096, 8192)
_FASTER = 0.98  # another offer must beat the first by this: less is noise


def timed_rows(limit: int) -> list[int]:
    """The M, ascending, at which offers are timed; the limit is one of them."""
    return sorted({*(m for m in _TIMED if m < limit), limit})


def prefer(offers: Mapping[int, Sequence[Algorithm]], times: Mapping[int, Sequence[float]]) -> dict[int, Kind]:
    """The kind to take at each M up to the last timed one, ascending.

    offers: by M, in the library's order. times: of each offer by M, in one unit; M with a single offer need none.
    """
    last = max(times, default=0)
    rows = [m for m in timed_rows(last) if offers.get(m)] if times else []
    return {m: offers[m][_fastest(times[m]) if m in times else 0].kind for m in rows}


def choose(
    rows: int, offers: Sequence[Algorithm], preferred: Mapping[int, Kind], may: Callable[[Kind], bool]
) -> Algorithm | None:
    """The offer that serves `rows`, of a kind that `may`; None where there is no such offer.

    It is of the kind preferred at the least M that is not below `rows`, else the first.
    """
    able = [offer for offer in offers if may(offer.kind)]
    above = min((m for m in preferred if m >= rows), default=None)
    kind = None if above is None else preferred[above]
    return next((offer for offer in able if offer.kind == kind), able[0] if able else None)


def compare(
    offers: Mapping[int, Sequence[Algorithm]],
    preferred: Mapping[int, Kind],
    differs: Callable[[int, Algorithm], int],
) -> dict[Kind, dict[int, int]]:
    """Outputs that differ from the reference, by kind and M: all kinds that serve some M or are offered first there.

    offers: by M, ascending, in the library's order. differs: (M, algorithm) -> outputs that differ. Each kind is
    compared at the first, a middle and the last of its M. What would serve in place of a kind that differs is compared
    in turn.
    """
    found: dict[Kind, dict[int, int]] = {}
    failed: set[Kind] = set()
    while True:
        uses: dict[Kind, dict[int, Algorithm]] = {}
        for m, offered in offers.items():
            serving = choose(m, offered, preferred, lambda kind, failed=failed: kind not in failed)
            for algorithm in (serving, *offered[:1]):
                if algorithm is not None and algorithm.kind not in failed:
                    uses.setdefault(algorithm.kind, {})[m] = algorithm
        for kind, used in uses.items():
            rows, known = list(used), found.setdefault(kind, {})
            for m in sorted({rows[0], rows[len(rows) // 2], rows[-1]} - known.keys()):
                known[m] = differs(m, used[m])
        differing = {kind for kind, wrong in found.items() if any(wrong.values())}
        if differing == failed:
            return found
        failed = differing


def _fastest(times: Sequence[float]) -> int:
    least = min(times)
    return times.index(least) if least <= times[0] * _FASTER else 0
