"""The choice among cuBLASLt's algorithms for a number of rows M: the fastest algorithm whose kind is certified.

An offer is an algorithm that the library proposes for an M. The library sorts its offers by its own estimate, and the
first offer is not always the fastest. Offers are timed at a few M. The fastest kind at a timed M also serves the M
between the timed M before and this M, because they need about as many tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bi_patch.ops.cuda.cublaslt import Algorithm, Kind

# M around which the number of tiles changes, for common sizes.
_TIMED = (1, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 768, 1024, 1536, 2048, 4096, 8192)
_FASTER = 0.98  # another offer must take at most this share of the first offer's time: less is noise


def timed_rows(limit: int) -> list[int]:
    """The M at which offers are timed, ascending, up to and including `limit`."""
    return sorted({*(m for m in _TIMED if m < limit), limit})


def prefer(offers: Mapping[int, Sequence[Algorithm]], times: Mapping[int, Sequence[float]]) -> dict[int, Kind]:
    """The fastest kind at each of timed_rows up to the last timed M, ascending.

    offers: by M, in the library's order. times: by M, the time of each offer, in one unit for all. An M with a single
    offer needs no times.
    """
    last = max(times, default=0)
    rows = [m for m in timed_rows(last) if offers.get(m)] if times else []
    return {m: offers[m][_fastest(times[m]) if m in times else 0].kind for m in rows}


def choose(
    rows: int, offers: Sequence[Algorithm], preferred: Mapping[int, Kind], may: Callable[[Kind], bool]
) -> Algorithm | None:
    """The offer that serves `rows`, among offers whose kind `may` accepts; None if `may` accepts no offer.

    The chosen offer has the kind preferred at the least M that is not below `rows`. Without an offer of this kind, the
    first accepted offer is chosen.
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
    """Compare kinds with the reference; returns by kind and M the number of outputs that differ.

    The function compares each kind that would serve some M or is the first offer for some M, at the first, a middle and
    the last such M. If a kind differs, the function also compares the kinds that would serve in its place. offers: by
    M, ascending, in the library's order. differs: (M, algorithm) -> the number of outputs that differ.
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
