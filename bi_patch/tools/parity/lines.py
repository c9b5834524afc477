"""The comparisons behind the lines of a parity report. Each is a stream of labels and differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bi_patch.ops import bits
from bi_patch.tools.parity import grpo
from bi_patch.tools.parity.batches import LAYOUTS, RIGHT
from bi_patch.tools.parity.plan import KINDS
from bi_patch.tools.parity.session import Session
from bi_patch.tools.verify.answers import Difference

Compared = Iterator[tuple[str, Difference]]


Measure = Callable[[Session], Compared]


def _layout(layout: str) -> Measure:
    def run(session: Session) -> Compared:
        samples = session.first_samples()
        yield from session.compared(samples, session.trainer.logprobs(samples, layout), layout)

    return run


def _chunked(session: Session) -> Compared:
    """Chunks of 7 rows: no sequence and no power of two fits."""
    samples = session.first_samples()
    yield from session.compared(samples, session.trainer.logprobs(samples, RIGHT, chunk=7), "head in chunks")


def _checkpointed(session: Session) -> Compared:
    samples = session.first_samples()
    with session.trainer.training(checkpointing=True):
        yield from session.compared(
            samples, [x.detach() for x in session.trainer.logprobs(samples, RIGHT, grad=True)], "checkpointing"
        )


def _sampling(session: Session) -> Compared:
    prompts = session.prompts()[:2]
    for kind in KINDS:
        label = ", ".join(f"{name} {value}" for name, value in kind.items())
        samples = session.sample(prompts, seed=300, tokens=session.plan.tokens, **kind)
        yield from session.compared(samples, session.trainer.logprobs(samples, RIGHT, **kind), label, **kind)


def _updates(session: Session) -> Compared:
    """New weights, with a prefix cache that is warm from the weights before, and back to the first weights."""
    trainer, first = session.trainer, session.trainer.saved()
    session.engine.reset_cache()
    yield from _updated(session, "as loaded")
    try:
        for step in range(1, session.plan.updates + 1):
            trainer.perturb(seed=step)
            trainer.sync(f"update {step}")
            yield from _updated(session, f"update {step}")
    finally:
        trainer.restore(first)
        trainer.sync("as loaded")
    yield from _updated(session, "back to the first weights")


def _updated(session: Session, label: str) -> Compared:
    samples = session.sample(session.prompts(), seed=500, tokens=session.plan.tokens)
    yield from session.compared(samples, session.trainer.logprobs(samples, RIGHT), label)


def _gradients(session: Session) -> Compared:
    """Each cut into micro-batches against the first, and the first twice; with checkpointing for the last cut."""
    samples = session.first_samples()
    expected = None
    for at, cut in enumerate((*session.plan.cuts, session.plan.cuts[0])):
        checkpointing = at == len(session.plan.cuts) - 1
        found = _gradient(session, samples, cut, checkpointing)
        label = f"micro-batches of {', '.join(map(str, cut))}{', checkpointing' if checkpointing else ''}"
        if expected is None:
            expected = found
        else:
            for name, value in expected.items():
                yield f"{label}: {name}", tensors(value, found[name], f"{label}: {name}")


def _gradient(session, samples, cut, checkpointing) -> dict[str, torch.Tensor]:
    total = sum(len(s.answer.tokens) for s in samples)
    draw = torch.Generator().manual_seed(0)
    advantages = torch.randn(len(samples), generator=draw).tolist()
    with session.trainer.training(checkpointing), session.trainer.gradients() as found:
        at = 0
        for size in cut:
            own = session.trainer.logprobs(samples[at : at + size], RIGHT, grad=True)
            loss = sum(-(x * a).sum() / total for x, a in zip(own, advantages[at : at + size]))
            loss.backward()
            at += size
    return found


def tensors(expected: torch.Tensor, got: torch.Tensor, label: str) -> Difference:
    """Compare two tensors element by element."""
    differing = bits.differing(got, expected)
    largest = float((got.double() - expected.double()).abs().max()) if differing else 0.0
    first = f"{label}: {differing:,} of {got.numel():,} elements, by up to {largest:.2g}" if differing else ""
    return Difference(got.numel(), differing, largest=largest, first=first)


# How each line of plan.LINES is measured, in the session's process.
MEASURES: dict[str, Measure] = {
    **{layout: _layout(layout) for layout in LAYOUTS},
    "chunked head": _chunked,
    "checkpointing": _checkpointed,
    "sampling": _sampling,
    "weight update": _updates,
    "gradients": _gradients,
    "GRPO": grpo.steps,
    "GRPO rerun": grpo.rerun,
}
