"""Axes about the other requests of a batch: their number, places, lengths, arrival times and contents."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.case import Case
from bi_patch.tools.verify.engine import Engine
from bi_patch.tools.verify.probes.base import NotExercised, Run

_EDGE = 256  # rows at which kernels change their block size


def needs_company(engine: Engine) -> str:
    return "" if engine.options.max_num_seqs > 1 else "max_num_seqs is 1: nothing runs beside a request"


def batch_size(run: Run) -> Iterator[Case]:
    """Every subject inside batches of each size. All subjects share a batch that has room for them."""
    yield from sizes(run, [run.greedy(i) for i in run.subjects], run.workload.sizes)


def sizes(run: Run, requests: list[Request], counts: Sequence[int]) -> Iterator[Case]:
    """The requests inside batches of these sizes.

    Sizes above max_num_seqs are left out. Sizes that do not fit into the KV cache are left out, and a note names them.
    Raises NotExercised when the KV cache leaves no batch of 256 rows or more.
    """
    load = run.workload
    counts = [n for n in counts if n <= run.engine.options.max_num_seqs]
    dropped = []
    for size in counts:
        groups = [requests] if size >= len(requests) else [[r] for r in requests]
        for group in groups:
            batch = [*group, *(load.filler(i) for i in range(size - len(group)))]
            random.Random(size).shuffle(batch)
            if not run.holds(batch):
                dropped.append(size)
                break
            labels = {r: f"{load.label(requests.index(r))} in a batch of {size}" for r in group}
            yield from run.each(batch, {batch.index(r): label for r, label in labels.items()})
    if not dropped:
        return
    words = (
        f"the KV cache of {run.engine.info.kv_tokens:,} tokens does not hold batches of {', '.join(map(str, dropped))} "
        "requests: give it more memory (on CPU: VLLM_CPU_KVCACHE_SPACE, in GiB), or lower max_num_seqs"
    )
    if any(n >= _EDGE for n in counts) and not any(n >= _EDGE for n in counts if n not in dropped):
        raise NotExercised(f"no batch crossed {_EDGE} rows: {words}")
    run.notes.append(words)


def position(run: Run) -> Iterator[Case]:
    """Every subject at each of the workload's places in a batch of nine, with the others in both orders."""
    fillers = [run.workload.filler(i) for i in range(8)]
    for index in run.subjects:
        for place in run.workload.places:
            for order in (fillers, fillers[::-1]):
                label = f"{run.workload.label(index)} at place {place} of 9"
                yield run.beside(order[:place], run.greedy(index), order[place:], label)


def arrivals(run: Run) -> Iterator[Case]:
    """Subjects that join a running batch, while other requests join and leave at different engine steps."""
    load = run.workload
    for spread in (1, 3):
        batch = [
            *(load.filler(i, delay=i % 5 * spread, max_tokens=2 + i % load.generate) for i in range(12)),
            *(run.greedy(i).but(delay=1 + i * spread) for i in run.subjects),
        ]
        yield from run.each(batch, {12 + i: f"{load.label(i)} joining late" for i in run.subjects})


def mixed_lengths(run: Run) -> Iterator[Case]:
    """Every subject beside many of the shortest fillers, and beside several of the longest."""
    load = run.workload
    fillers = sorted((load.filler(i) for i in range(len(load.fillers))), key=lambda r: len(r.prompt))
    for index in run.subjects:
        for others, kind in ((fillers[:24], "24 short"), (fillers[-6:], "6 long")):
            half = len(others) // 2
            label = f"{load.label(index)} beside {kind} prompts"
            yield run.beside(others[:half], run.greedy(index), others[half:], label)


def contents(run: Run) -> Iterator[Case]:
    """Each subject beside requests with other tokens. A scale that the batch shares would change with these tokens.

    The others repeat one token, alternate between two tokens, or have random tokens. Shapes, places and counts stay.
    """
    load = run.workload
    vocabulary = run.engine.info.vocab_size - run.engine.info.vocab_size // 16
    source = random.Random(11)
    kinds = {
        "one token over and over": lambda i: [source.randrange(vocabulary)] * 24,
        "two tokens in turn": lambda i: [i % vocabulary, (7 * i + 1) % vocabulary] * 12,
        "random tokens": lambda i: [source.randrange(vocabulary) for _ in range(24)],
    }
    count = min(15, run.engine.options.max_num_seqs - 1)
    for index in run.subjects:
        for kind, words in kinds.items():
            others = [Request(tuple(words(i)), max_tokens=load.generate) for i in range(count)]
            half = count // 2
            yield run.beside(others[:half], run.greedy(index), others[half:], f"{load.label(index)} beside {kind}")
