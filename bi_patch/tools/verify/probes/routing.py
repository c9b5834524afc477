"""The axis "routed experts": the experts that a caller gets back for each token of its own request."""

from __future__ import annotations

from collections.abc import Iterator

from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.engine import SERVER, Engine, Options
from bi_patch.tools.verify.probes.base import NotExercised, Run, config, either, pair
from bi_patch.tools.verify.probes.company import needs_company, sizes

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names in a config.json
_SIZES = (2, 17, 64)


def _needs_experts(engine: Engine) -> str:
    if engine.info.platform == SERVER:
        return "verify does not ask a server for routed experts"
    if engine.info.platform == "cpu":
        return "vLLM returns routed experts from model runner V2, which the CPU build does not have"
    found = config(engine.options.model)
    held = found.get("text_config") or found
    return "" if not found or any(held.get(name) for name in _COUNTS) else "the model has no experts"


missing = either(_needs_experts, needs_company)


def options(base: Options) -> dict[str, object]:
    return {"extra": {**base.extra, "enable_return_routed_experts": True}}


def routing(run: Run) -> Iterator[Case]:
    """Each subject's routed experts in batches and on the warm cache. Raises NotExercised where none are returned."""
    requests = [run.greedy(i) for i in run.subjects]
    if not all(answer.experts for answer in run.alone(requests)):
        raise NotExercised("routed experts: the engine returned none")
    yield from sizes(run, requests, [n for n in _SIZES if n <= run.engine.options.max_num_seqs])
    for index, request in zip(run.subjects, requests):
        (expected,) = run.alone([request])
        warm = Scenario([request], warmup=[[request]])
        label = f"{run.workload.label(index)}, warm"
        yield pair(label, Scenario.alone(request), warm, expected, run.scenario(warm))
