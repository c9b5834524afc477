"""Plants cause 17, compiled code against eager code: the compiled engine leaves the norms' seams open.

Inductor's code for vLLM's own norms rounds in other places. The fault must exist before the model is compiled, so it
needs new engines. Ops inside compiled code cannot be traced, so each layer's keys and values name the place.
"""

from __future__ import annotations

from collections.abc import Callable

from bi_patch.tools.faults.catch import Caught, workload
from bi_patch.tools.verify import locate
from bi_patch.tools.verify.case import Scenario
from bi_patch.tools.verify.child import ARMED, ChildEngine
from bi_patch.tools.verify.engine import Info, Options
from bi_patch.tools.verify.instruments import COMPILED
from bi_patch.tools.verify.probes import CROSS_PROBES
from bi_patch.tools.verify.trace import CACHE

NAME, CAUSE, AXIS = "compiled norms outside the order", 17, "eager and compiled"
_SEAMS = {"cpu": "norm.cpu_rms", "cuda": "norm.cuda_rms,norm.cuda_rms_native"}


def catch_compiled(
    given: Options,
    environ: dict[str, str],
    platform: str,
    *,
    planted: bool = True,
    started: Callable[[Info], object] = lambda info: None,
) -> Caught:
    """Run the axis on an eager and a compiled engine with these options, and locate where the two part.

    planted: False leaves the fault out. platform: cpu or cuda. started: called when the eager engine has started.
    Raises what ChildEngine raises.
    """
    probe = next(p for p in CROSS_PROBES if p.name == AXIS)
    eager = given.but(eager=True, digests=False)
    with ChildEngine(ARMED, eager, environ=environ) as engine:
        started(engine.info)
        load = workload(engine)
        requests, change = probe.requests(engine, load), probe.changes(engine)[0]
        scenario = Scenario(requests, len(load.subjects) - 1)  # the longest fills whole KV blocks
        expected = probe.collect(engine, load)
        alone = locate.trace(engine, scenario, coarse=True)
    leave = {"BI_PATCH_LEAVE_OPEN": _SEAMS[platform], "BI_PATCH_ALLOW_OPEN": "1"} if planted else {}
    with ChildEngine(ARMED, eager.but(**change.options), environ=environ | leave, fresh=True) as engine:
        got = probe.collect(engine, load, change)
        company = locate.trace(engine, scenario, coarse=True)
        seams = ", ".join(engine.info.open_seams)
    cases = list(probe.cases(change, requests, expected, got))
    case = next((case for case in cases if case.differs), None)
    if case is None:
        return Caught(NAME, CAUSE, AXIS, False, False, len(cases))
    located = locate.judge(cases[scenario.index], alone, company, coarse=True)
    right = located is not None and (located.seam, located.op) == (COMPILED, CACHE)
    words = f"{located.words()}\nrequired seams open there: {seams}" if located else ""
    return Caught(NAME, CAUSE, AXIS, True, right, len(cases), f"{case.label}: {case.difference.first}", words, located)
