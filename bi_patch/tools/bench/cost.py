"""Measures the cost of invariance: stock and armed engines run side by side and answer the same workloads in turn."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from bi_patch.tools.evidence import CostRow
from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.child import ARMED, STOCK, UPSTREAM, ChildEngine, EngineFailed
from bi_patch.tools.verify.engine import Info, Options

# The largest accepted ratio of armed time to stock time, by platform; on GPUs, invariance must cost nothing.
_TARGETS = {"cpu": 1.10}


def target(platform: str) -> float:
    return _TARGETS.get(platform.partition("-")[0], 1.00)


@dataclass(frozen=True)
class Load:
    """`count` concurrent requests, each with `prompt` random tokens and `tokens` generated tokens."""

    name: str
    count: int
    prompt: int
    tokens: int

    def requests(self, vocab_size: int, seed: int) -> list[Request]:
        source = random.Random(seed)
        limit = vocab_size - vocab_size // 16
        return [
            Request(tuple(source.randrange(limit) for _ in range(self.prompt)), max_tokens=self.tokens, logprobs=None)
            for _ in range(self.count)
        ]


LOADS = (
    Load("prefill 8 x 512", 8, 512, 1),
    Load("prefill 1 x 3000", 1, 3000, 1),
    Load("decode 1 x 64", 1, 8, 64),
    Load("decode 8 x 64", 8, 8, 64),
    Load("decode 64 x 64", 64, 8, 64),
)


def measure(
    label: str,
    options: Options,
    *,
    repeats: int = 5,
    upstream: bool = True,
    loads: Sequence[Load] = LOADS,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[list[CostRow], Info, str]:
    """The rows of one model, the armed engine's Info, and a note on upstream's mode ("" when that mode ran).

    In every repeat, the stock, upstream and armed engines answer the same new prompts in turn. The first round is not
    counted. Prefix caching is off, so that no repeat uses another's cache. upstream: whether to measure upstream's mode
    where it runs. Raises the error of an engine that fails.
    """
    options = options.but(prefix_caching=False)
    note = ""
    with ExitStack() as stack:
        engines = {}
        tell(f"{label}: starting the stock engine")
        engines[STOCK] = stack.enter_context(ChildEngine(STOCK, options))
        if upstream:
            try:
                tell(f"{label}: trying upstream's own mode")
                with ExitStack() as trial:
                    engine = trial.enter_context(ChildEngine(UPSTREAM, options))
                    engine.generate([Request(tuple(range(5, 40)), max_tokens=2)])  # on CPU it fails after its start
                    engines[UPSTREAM] = engine
                    stack.push(trial.pop_all())
            except EngineFailed as error:
                note = f"Upstream's own mode (VLLM_BATCH_INVARIANT=1) does not run here: {error.kind}."
        tell(f"{label}: starting the armed engine")
        engines[ARMED] = stack.enter_context(ChildEngine(ARMED, options))
        vocab = engines[ARMED].info.vocab_size
        rows = []
        for load in loads:
            times: dict[str, list[float]] = {mode: [] for mode in engines}
            for repeat in range(repeats + 1):
                tell(f"{label}: {load.name}, {'warming up' if not repeat else f'{repeat} of {repeats}'}")
                requests = load.requests(vocab, repeat)
                # Every other repeat reverses the order of engines, so that a drift of the machine favours none.
                for mode in list(engines)[:: -1 if repeat % 2 else 1]:
                    engines[mode].generate(requests)
                    if repeat:
                        times[mode].append(engines[mode].seconds * 1000)
            rows.append(row(label, load.name, times, repeats))
        return rows, engines[ARMED].info, note


def is_noisy(found: CostRow) -> bool:
    """Whether an engine's slowest repeat took over 1.3 times its fastest: then the machine was busy."""
    return any(r is not None and r[1] > 1.3 * r[0] for r in (found.stock_range, found.armed_range))


def row(model: str, workload: str, times: dict[str, list[float]], repeats: int) -> CostRow:
    """A row with medians, ranges and the median of paired ratios. times: each mode's repeats in order, in ms."""

    def median(mode: str) -> float | None:
        return round(statistics.median(times[mode]), 2) if times.get(mode) else None

    def spread(mode: str) -> tuple[float, float]:
        return round(min(times[mode]), 2), round(max(times[mode]), 2)

    ratios = [armed / stock for stock, armed in zip(times[STOCK], times[ARMED], strict=True)]
    return CostRow(
        model,
        workload,
        "ms",
        median(STOCK),
        median(UPSTREAM),
        median(ARMED),
        repeats,
        round(statistics.median(ratios), 3),
        spread(STOCK),
        spread(ARMED),
    )
