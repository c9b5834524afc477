"""The stages of a worker's start, over all ranks of an engine: what stops one rank stops every rank, with the reason.

A check or a certificate may fail on one rank alone. The others would wait for this rank in their next exchange: with
peer memory for ever, else for half an hour. So a rank that stops says why, in the store by which PyTorch connected the
ranks. A thread of each rank looks there until every rank has started. A rank that waits cannot be woken, so its process
ends after GRACE seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from bi_patch import errors

# In this order. Each belongs to a worker of vLLM; the ranks are connected in the first.
STAGES = (
    "init_device",
    "load_model",
    "determine_available_memory",
    "initialize_from_config",
    "compile_or_warm_up_model",
)
LOOK, HEARD, GRACE = 0.5, 5.0, 10.0  # seconds
_REASON, _HEARD, _STARTED = "reason", "heard", "started"
_log = logging.getLogger("vllm.bi_patch")
_numbers = count()  # of this process's engines: ranks make them in one order
_watches: list[Watch] = []  # the newest engine's, if its ranks are connected


class Watch:
    """A rank's view of the others' start. store: of torch.distributed, with keys of this engine alone."""

    def __init__(self, store: Any, rank: int, ranks: int) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._started = False
        self._heard: errors.BiPatchError | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()  # this rank has raised, and waits for nobody
        self._thread = threading.Thread(target=self._look, name="bi_patch-start", daemon=True)
        self._thread.start()
        atexit.register(self._leave)

    def failed(self, error: Exception) -> errors.BiPatchError | None:
        """Tell the others that this rank stops for `error`. Returns what stopped another rank before, if `error` can
        be its consequence."""
        self._leave()
        reason = self._reason()
        with contextlib.suppress(RuntimeError):  # the store's process has ended
            if reason is None:
                text = str(error) or type(error).__name__
                self._store.compare_set(_REASON, "", json.dumps([self._rank, type(error).__name__, text]))
                self._reason()  # another rank's may have come first, and waits until it is heard
            self._told()
        return None if isinstance(error, errors.BiPatchError) else reason

    def passed(self, last: bool) -> None:
        """A stage of this rank is over, the last or another. Raises what stopped another rank."""
        if (reason := self._reason()) is not None:
            self._leave()
            with contextlib.suppress(RuntimeError):
                self._told()
            raise reason
        if last:
            self._started = True
            with contextlib.suppress(RuntimeError):
                self._store.add(_STARTED, 1)

    def _reason(self) -> errors.BiPatchError | None:
        """What stopped another rank, as an error of this rank. None if nothing did."""
        if self._heard is not None:
            return self._heard  # the store's process may have ended since
        try:
            if not self._store.check([_REASON]):
                return None
            rank, kind, text = json.loads(self._store.get(_REASON))
            if rank == self._rank:
                return None
            with self._lock:
                if self._heard is None:
                    made = getattr(errors, kind, errors.BiPatchError)
                    self._heard = made(f"{text} (rank {rank} said this, and stopped)")
                    self._store.add(_HEARD, 1)
        except RuntimeError as error:
            if self._heard is None and not self._started:
                return errors.BiPatchError(f"another rank's process has ended ({error})")
        return self._heard

    def _leave(self) -> None:
        """This rank looks no more. A thread inside the store while Python ends would hang or abort."""
        self._over.set()
        self._thread.join(HEARD)

    def _told(self) -> None:
        """Wait until the others have heard: the store may end with this process."""
        limit = time.monotonic() + HEARD
        while self._store.add(_HEARD, 0) < self._ranks - 1 and time.monotonic() < limit:
            time.sleep(LOOK / 5)

    def _all_started(self) -> bool:
        try:
            return self._store.add(_STARTED, 0) >= self._ranks
        except RuntimeError:
            return self._started

    def _look(self) -> None:
        while (reason := self._reason()) is None:
            if self._over.wait(LOOK) or self._all_started():
                return
        if not self._over.wait(GRACE):
            _log.critical("%s. This rank waits for that rank, so this process ends", reason)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


def watch(world: Any) -> None:
    """Look after the other ranks of `world`, vLLM's group of the engine's ranks, from now on. Every rank calls it."""
    _watches.clear()
    number = next(_numbers)
    if world.world_size == 1 or (store := _store()) is None:
        return
    import torch.distributed as dist

    own = dist.PrefixStore(f"bi_patch/start/{number}", store)
    if _answers(own):
        _watches.append(Watch(own, world.rank_in_group, world.world_size))


def guard(worker: Any) -> None:
    """Let the other ranks know if a stage of `worker`, a worker of vLLM, fails; and stop it if another rank failed."""
    _watches.clear()  # an engine before this one may have failed
    for name in STAGES:
        if callable(method := getattr(worker, name, None)):
            setattr(worker, name, _guarded(method, last=name == STAGES[-1]))


def _guarded(method: Callable[..., Any], last: bool) -> Callable[..., Any]:
    @functools.wraps(method)
    def stage(*args, **kwargs):
        try:
            result = method(*args, **kwargs)
        except Exception as error:
            if _watches and (reason := _watches[0].failed(error)) is not None:
                raise reason from error
            raise
        if _watches:
            _watches[0].passed(last)
        return result

    return stage


def _store() -> Any | None:
    """A connection of its own to the store of PyTorch's ranks, for another thread may wait in the first. None if vLLM
    connected the ranks in another way, or if the store has no second connection."""
    from torch.distributed import distributed_c10d as c10d

    try:
        store = c10d._get_default_store()
    except ValueError:
        return None
    try:
        return store.clone() if hasattr(store, "clone") else store
    except Exception as error:  # of any kind: a program can write a store of its own
        return _unwatched(store, error)


def _answers(store: Any) -> bool:
    """Whether a store has all that a Watch asks of it."""
    try:
        store.check([_REASON])
        store.compare_set("asked", "", "1")
        return store.add(_HEARD, 0) >= 0
    except Exception as error:
        _unwatched(store, error)
        return False


def _unwatched(store: Any, error: Exception) -> None:
    kind = type(getattr(store, "underlying_store", store)).__name__
    _log.info(
        "%s, the store of the ranks, cannot carry what stops a rank's start (%s): ranks look after none", kind, error
    )
