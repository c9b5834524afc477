"""Every patch point and its state in this process: the start-up check's findings, and the rest of the catalog."""

from __future__ import annotations

from bi_patch.arming import catalog, process, startup
from bi_patch.arming.startup import Finding
from bi_patch.seams.model import Seam, Variable

NOT_NEEDED = "not needed here"


def everything(*, load: bool = True) -> list[Finding]:
    """Every seam of the catalog with its state in this process; empty when nothing is armed.

    load: see startup.inspect.
    """
    return [*startup.inspect(load=load), *not_needed()]


def not_needed() -> list[Finding]:
    """The seams of other platforms and releases, which this process does not close."""
    current = process.state()
    if current is None:
        return []
    plan = current.plan
    planned = {p.seam.name for p in plan.seams}
    findings = []
    for seam in catalog.CATALOG.seams:
        if seam.name in planned:
            continue
        reason = (
            f"vLLM {plan.release} does not have it"
            if plan.platform in seam.platforms
            else f"for {', '.join(sorted(seam.platforms))} only"
        )
        target = seam.target(plan.release) or seam.targets[0]
        findings.append(
            Finding(seam.name, seam.area, str(target), NOT_NEEDED, reason, seam.required, seam.why, seam.how)
        )
    return findings


def declared() -> dict[str, Seam | Variable]:
    """Every seam and environment variable of the catalog by name, of every platform and release."""
    return {d.name: d for d in catalog.CATALOG.seams + catalog.CATALOG.variables}
