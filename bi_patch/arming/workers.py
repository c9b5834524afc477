"""The engine's check of its workers: each must pass the start-up check of the same bi_patch, wherever it runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from bi_patch import identity
from bi_patch.arming import process, startup
from bi_patch.errors import BiPatchError, SeamOpen
from bi_patch.ops.certificates import Counts, counts
from bi_patch.ops.certificates import failed as own_failed
from bi_patch.seams import active

_CURE = (
    "Install the same bi_patch for every worker, and set VLLM_BATCH_INVARIANT=1 in the environment in which Ray or the "
    "other nodes start. Or set BI_PATCH=0 to run vLLM without bi_patch"
)


def check(executor: Any) -> None:
    """Ask every worker of vLLM's executor. Raises SeamOpen with each worker that is not armed by this bi_patch."""
    try:
        found = executor.collective_rpc(report)
    except BiPatchError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise SeamOpen(f"a worker could not say whether it is armed: {said}. {_CURE}") from error
    wrong = [f"{i} ({said or 'not armed'})" for i, said in enumerate(found) if said != _own()]
    if wrong:
        raise SeamOpen(
            f"bi_patch cannot promise batch invariance: of {len(found)} workers, {', '.join(wrong)} are not armed by "
            f"this bi_patch ({_own()}). {_CURE}"
        )


def _own() -> str:
    """The digest of this bi_patch, and the parts of K that BI_PATCH_TP_INVARIANT asks for."""
    return f"{identity.digest()}{f' BI_PATCH_TP_INVARIANT={active.leaves}' if active.leaves else ''}"


def report(worker: Any) -> str:
    """In a worker: run the start-up check. Returns what bi_patch it has, or "" if the worker is not armed."""
    startup.check()
    current = process.state()
    return _own() if current is not None else ""


def certificates(executor: Any) -> Counts:
    """The certificates of all workers, once their models are loaded."""
    return sum((Counts(*held) for held in executor.collective_rpc(_certificates)), start=Counts())


def _certificates(worker: Any) -> tuple[int, int, int, dict[str, float]]:
    """In a worker: the fields of its Counts, as plain data for the way between processes."""
    held = counts()
    return held.passed, held.failed, held.cached, held.seconds


def failed(executor: Any) -> tuple[str, ...]:
    """The certificates that failed in a worker: operation and problem."""
    return tuple(sorted({name for names in executor.collective_rpc(_failed) for name in names}))


def _failed(worker: Any) -> list[str]:
    """In a worker: its certificates that failed."""
    return own_failed()


def routes(executor: Any, platform: str) -> dict[str, int]:
    """How many linear layers of all workers each route serves, by the route's name. Empty but on CPU."""
    if platform != "cpu":
        return {}
    found: Counter[str] = Counter()
    for held in executor.collective_rpc(_routes):
        found.update(held)
    return dict(sorted(found.items()))


def _routes(worker: Any) -> dict[str, int]:
    """In a worker on CPU: its linear layers by route."""
    from bi_patch.ops.cpu import routes

    return routes.counts(worker.get_model())
