"""The sign of an armed engine: a record that the engine core makes, and the line that says so in the log.

An environment without bi_patch cannot say that it is not armed. So an engine without this sign counts as not armed.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import msgspec

from bi_patch import identity, running
from bi_patch.arming import contract, process, workers
from bi_patch.errors import SeamOpen, UnsupportedFeature
from bi_patch.ops.certificates import Counts
from bi_patch.platforms.features import table
from bi_patch.seams import agreement

_log = logging.getLogger("vllm.bi_patch")


class Sign(msgspec.Struct, frozen=True):
    """What an armed engine core says of itself.

    version, digest: bi_patch's release and the digest of its code. vllm, platform: as in the plan. closed, seams: the
    numbers of patch points that are closed, and of all whose modules an engine core loads. certificates: those of all
    workers. untried: what this engine uses, and what the feature table calls untried. contract: what decides
    the engine's bits (bi_patch.arming.contract). linears: how many linear layers each route serves, on CPU. settings:
    those of its process that decide bits. failed: the certificates of all workers that failed.
    """

    version: str
    digest: str
    vllm: str
    platform: str
    closed: int
    seams: int
    certificates: Counts
    untried: tuple[str, ...] = ()
    contract: dict[str, Any] = {}
    linears: dict[str, int] = {}
    settings: dict[str, str] = {}
    failed: tuple[str, ...] = ()

    def words(self) -> str:
        """One line for a log."""
        untried = f"; untried: {', '.join(self.untried)}" if self.untried else ""
        kernels = f"kernels {self.contract['kernels']}, " if "kernels" in self.contract else ""
        routes = ", ".join(f"{count} {route}" for route, count in self.linears.items())
        linears = f"linears: {routes}, " if routes else ""
        return (
            f"bi_patch {self.version} armed: vLLM {self.vllm} on {self.platform}, {self.closed} of {self.seams} patch "
            f"points closed, {self.certificates.words()}, "
            f"{kernels}{linears}digest {self.digest[:12]}{untried}"
        )


def make(config: Any, executor: Any) -> None:
    """In the engine core, once its workers are ready: make the sign, keep it in the state, and log it.

    config: the engine's VllmConfig. executor: vLLM's executor. Does nothing in a process that is not armed.
    """
    current = process.state()
    if current is None:
        return
    from bi_patch import __version__

    plan = current.plan
    current.engine = Sign(
        __version__,
        identity.digest(),
        str(plan.release),
        plan.platform,
        current.closed,
        sum(not p.seam.on_import or p.target.module in sys.modules for p in plan.seams),
        workers.certificates(executor),
        table.untried(config, plan.platform, plan.release),
        contract.make(config, executor, plan.platform, str(plan.release)),
        workers.routes(executor, plan.platform),
        agreement.settings(plan.platform),
        workers.failed(executor),
    )
    running.keep(current.engine.contract)
    _log.info("%s (engine core)", current.engine.words())


def held() -> dict[str, object] | None:
    """The engine's sign as plain data, or None before the engine core made it, and in a process that is not armed."""
    current = process.state()
    return None if current is None or current.engine is None else msgspec.to_builtins(current.engine)


def take(payload: bytes) -> Sign | None:
    """In a front end: check the sign in an engine core's ready message, keep it in the state, and log it.

    payload: the message, a msgpack map. Raises SeamOpen if the engine core is not armed by this bi_patch. Returns None
    in a process that is not armed.
    """
    current = process.state()
    if current is None:
        return None
    said = msgspec.msgpack.decode(payload).get("bi_patch") if payload else None
    try:
        found = msgspec.convert(said, Sign) if said else None
    except msgspec.ValidationError:
        found = None  # the sign of another release of bi_patch
    if found is None or found.digest != identity.digest():
        raise SeamOpen(
            "bi_patch cannot promise batch invariance: the engine core "
            + (f"is armed by another bi_patch ({said.get('digest')})" if said else "is not armed")
            + f", and its front end is armed by bi_patch {identity.digest()}. Install the same bi_patch wherever an "
            "engine core runs, and set VLLM_BATCH_INVARIANT=1 there. Or set BI_PATCH=0 to run vLLM without bi_patch"
        )
    current.engine = found
    running.keep(found.contract)
    _log.info("%s (front end, as its engine core says)", found.words())
    return found


def compare(first: Sign, other: Sign) -> None:
    """Compare two data-parallel engine cores of one front end: its load decides which of them serves a request.

    Raises UnsupportedFeature with what decides their bits and differs.
    """
    one, two = _decides(first), _decides(other)
    differing = [name for name in sorted(one | two) if one.get(name) != two.get(name)]
    if differing:
        said = ", ".join(f"{name} ({one.get(name)} and {two.get(name)})" for name in differing)
        raise UnsupportedFeature(
            f"engine.front_end: data-parallel engine cores differ in {said}, so the load would decide a request's "
            "bits. Use devices of one kind with the same settings and library versions for all of them, or set "
            "BI_PATCH=0 for every one"
        )


def _decides(sign: Sign) -> dict[str, Any]:
    """What decides an engine core's bits, by name: all of its contract but vLLM's name of the engine.

    A layer of 16-bit weights has the same bits by each route, also after a certificate failed. One of quantized weights
    may have others.
    """
    held = {name: value for name, value in sign.contract.items() if name != "instance"}
    if held.get("quantization"):
        held |= {"linears": sign.linears, "failed certificates": list(sign.failed)}
    return held | sign.settings
