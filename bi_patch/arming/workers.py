"""Workers: each, wherever it runs, must have passed the start-up check of the same bi_patch as the engine that asks."""

from __future__ import annotations

from typing import Any

from bi_patch import identity
from bi_patch.arming import process, startup
from bi_patch.errors import BiPatchError, SeamOpen

_CURE = (
    "Install the same bi_patch for every worker, with VLLM_BATCH_INVARIANT=1 in the environment in which Ray or the "
    "other nodes start, or set BI_PATCH=0 to run without bi_patch"
)


def check(executor: Any) -> None:
    """Ask every worker of vLLM's executor. Raises SeamOpen, which says which worker is not armed or by what."""
    try:
        found = executor.collective_rpc(report)
    except BiPatchError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise SeamOpen(f"a worker could not say whether it is armed: {said}. {_CURE}") from error
    wrong = [f"{i} ({said or 'not armed'})" for i, said in enumerate(found) if said != identity.digest()]
    if wrong:
        raise SeamOpen(
            f"batch invariance cannot be promised: of {len(found)} workers, {', '.join(wrong)} are not armed by this "
            f"bi_patch ({identity.digest()}). {_CURE}"
        )


def report(worker: Any) -> str:
    """In a worker: the digest of the bi_patch whose start-up check it passes, or "" where it is not armed."""
    startup.check()
    current = process.state()
    return identity.digest() if current is not None else ""
