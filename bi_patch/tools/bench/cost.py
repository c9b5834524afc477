"""What invariance costs: the same workloads on stock and armed engines that live side by side, measured in turns."""

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

# How many times stock's time armed may take, by platform; on GPUs invariance is to cost nothing.
_TARGETS = {"cpu": 1.10}


def target(platform: str) -> float:
    return _TARGETS.get(platform, 1.00)


@dataclass(frozen=True)
class Load:
    """`count` requests of `prompt` random tokens that generate `tokens` each, all at once."""

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
    """Rows for one model, what the armed engine is, and a note on upstream's mode ("" when it ran).

    Every repeat asks stock, (upstream,) armed in turn for the same fresh prompts; a first round of each is dropped.
    Prefix caching is off, so that no repeat is served from another. Raises what an engine fails with.
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
                    engine.generate([Request(tuple(range(5, 40)), max_tokens=2)])  # on CPU it starts, then fails
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
                # Every other repeat goes the other way round, so that a drift of the machine favours nobody.
                for mode in list(engines)[:: -1 if repeat % 2 else 1]:
                    engines[mode].generate(requests)
                    if repeat:
                        times[mode].append(engines[mode].seconds * 1000)
            rows.append(row(label, load.name, times, repeats))
        return rows, engines[ARMED].info, note


def is_noisy(found: CostRow) -> bool:
    """True when repeats of one engine lie over 1.3 times apart: something else ran, and the row proves nothing."""
    return any(r is not None and r[1] > 1.3 * r[0] for r in (found.stock_range, found.armed_range))


def row(model: str, workload: str, times: dict[str, list[float]], repeats: int) -> CostRow:
    """Medians, ranges and the paired ratio of times in ms; `times` maps a mode to its repeats in order."""

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
