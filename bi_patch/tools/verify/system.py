"""The system that verify measures: engines that it can start, or a running server."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Protocol

from bi_patch.tools.verify.child import PATIENT, ChildEngine
from bi_patch.tools.verify.engine import Engine, Options
from bi_patch.tools.verify.server import ServerEngine


class System(Protocol):
    """What verify measures.

    name: the report shows it. mode: armed, upstream, stock or server. options: the base engine's options. restarts:
    whether verify can start engines with other options.
    """

    name: str
    mode: str
    options: Options
    restarts: bool

    def start(self, options: Options, *, fresh: bool = False) -> AbstractContextManager[Engine]:
        """Return a live engine with these options. fresh: start it with empty compile caches."""


class LocalEngines:
    """Engines in child processes of this machine, one at a time."""

    restarts = True

    def __init__(self, mode: str, options: Options, *, environ: dict[str, str] | None = None) -> None:
        self.name, self.mode, self.options = options.model, mode, options
        self._environ = PATIENT | dict(os.environ) | (environ or {})

    def start(self, options: Options, *, fresh: bool = False, kind: type[ChildEngine] = ChildEngine) -> ChildEngine:
        """kind: the class of the child, for another tool's children."""
        return kind(self.mode, options, environ=self._environ, fresh=fresh)


class RunningServer:
    """A running server; verify cannot change its options."""

    mode, restarts = "server", False

    def __init__(self, url: str, *, model: str = "", timeout: float = 600.0) -> None:
        self.name, self._url, self._model, self._timeout = url, url, model, timeout
        self.options = Options(model or "served")

    def start(self, options: Options, *, fresh: bool = False) -> ServerEngine:
        return ServerEngine(self._url, model=self._model, timeout=self._timeout)
