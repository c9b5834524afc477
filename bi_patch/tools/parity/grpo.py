"""GRPO on the live sampler and trainer: sample, score, train on fp32 masters, sync. Runs twice with other sizes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

import torch

from bi_patch.ops import bits
from bi_patch.tools.parity import checkpoints
from bi_patch.tools.parity.batches import RIGHT
from bi_patch.tools.parity.plan import Run, Spent, Step
from bi_patch.tools.parity.session import Session, difference, k3
from bi_patch.tools.verify.answers import Difference

CLIP = 0.2  # of the ratio of the new and the old policy
_WORDS = {"reward": "reward", "norm": "gradient norm", "masters": "the checksum of the master weights"}


def steps(session: Session) -> Iterator[tuple[str, Difference]]:
    """The first run and the second one. Yields what each step compared; the runs stay in `session.runs`."""
    session.runs.clear()
    for micro, seats in zip(session.plan.micro, session.plan.seats):
        yield from _run(session, micro, seats)


def rerun(session: Session) -> Iterator[tuple[str, Difference]]:
    """The two runs against each other: the numbers of each step, then every element of the master weights."""
    (first, masters), (second, again) = session.runs
    for at, (a, b) in enumerate(zip(first.steps, second.steps)):
        yield f"step {at}", _numbers(f"step {at}", a, b)
    if len(first.steps) != len(second.steps):  # one of them was out of time
        return
    for name, value in masters.items():
        differing = bits.differing(again[name], value)
        words = f"master weight {name}: {differing:,} of {value.numel():,} elements" if differing else ""
        yield name, Difference(value.numel(), differing, first=words)


def _numbers(label: str, a: Step, b: Step) -> Difference:
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in ("reward", "norm", "masters")}
    wrong = [f"{_WORDS[name]} {x!r} became {y!r}" for name, (x, y) in pairs.items() if x != y]
    return Difference(len(pairs), len(wrong), first=f"{label}: {wrong[0]}" if wrong else "")


def _run(session: Session, micro: int, seats: int) -> Iterator[tuple[str, Difference]]:
    trainer, plan = session.trainer, session.plan
    initial = trainer.saved()
    masters = {name: p.detach().float().clone() for name, p in trainer.model.named_parameters()}
    optimizer = torch.optim.AdamW(
        list(masters.values()), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.0, foreach=False
    )
    held = checkpoints.Checkpoint(session, micro, seats)
    done, spent, calls = held.load(masters, optimizer)
    began = time.monotonic()
    try:
        if done:
            trainer.write(masters)
            trainer.sync(f"resumed after {len(done)} steps")
        with session.seated(seats):
            for at in range(len(done), plan.steps):
                label = f"micro-batches of {micro}, step {at}"
                clock = _Clock(trainer.device)
                step, compared = _step(session, micro, at, label, masters, optimizer, clock)
                yield from compared
                trainer.write(masters)
                trainer.sync(label)
                clock.passed()
                done.append(step)
                spent.append(Spent(*clock.seconds))
                held.tell(at, done[-1], spent[-1])
                if plan.seconds and time.monotonic() - began > plan.seconds:
                    break
        held.save(done, spent, calls, masters, optimizer)
    finally:
        trainer.restore(initial)
        trainer.sync("as loaded")
    session.runs.append((Run(micro, seats, done, digest(masters), spent, calls), masters))


class _Clock:
    """Seconds of the parts of a step. A part ends when the device is done."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, []
        self._at = time.perf_counter()

    def passed(self) -> None:
        """A part ends here."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds.append(now - self._at)
        self._at = now


def _step(session, micro, at, label, masters, optimizer, clock) -> tuple[Step, list[tuple[str, Difference]]]:
    trainer, plan = session.trainer, session.plan
    prompts = [prompt for prompt in session.short_prompts() for _ in range(plan.group)]
    samples = session.sample(prompts, seed=1000 * (at + 1), tokens=plan.tokens, **plan.transforms)
    clock.passed()
    rewards = torch.tensor([reward(s.answer.tokens) for s in samples]).view(-1, plan.group)
    spread = rewards.std(1, keepdim=True) + 1e-4
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / spread).flatten().tolist()
    total = sum(len(s.answer.tokens) for s in samples)  # known before the first micro-batch
    compared, kl = [], 0.0
    with trainer.training(), trainer.gradients() as found:
        for begin in range(0, len(samples), micro):
            part = samples[begin : begin + micro]
            own = torch.cat(trainer.logprobs(part, RIGHT, grad=True, **plan.transforms))
            sizes = [len(sample.answer.tokens) for sample in part]
            for offset, (sample, new) in enumerate(zip(part, own.detach().cpu().split(sizes))):
                name = f"{label}, sample {begin + offset}"
                compared.append((name, difference(sample.answer, new, name)))
                if compared[-1][1].differing:
                    session.looking = sample, plan.processed
                kl += k3(sample.answer, new)
            old = [logprob for sample in part for logprob in sample.answer.logprobs]
            gains = [advantages[begin + i] for i, size in enumerate(sizes) for _ in range(size)]
            old, gain = torch.tensor([old, gains], device=own.device)
            ratio = (own - old).exp()
            (-torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).sum() / total).backward()
    clock.passed()
    for name, master in masters.items():
        master.grad = found[name]
    norm = torch.nn.utils.clip_grad_norm_(list(masters.values()), 1.0, foreach=False)
    optimizer.step()
    optimizer.zero_grad()
    clock.passed()
    counted = [d for _, d in compared]
    step = Step(
        float(rewards.mean()),
        float(norm),
        kl / total,
        sum(d.compared for d in counted),
        sum(d.differing for d in counted),
        checkpoints.checksum(masters),
    )
    return step, compared


def reward(tokens: list[int]) -> float:
    """The share of even token ids: a reward that every model can earn and whose groups differ."""
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


def digest(masters: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the bits of all master weights, in the order of their names."""
    found = hashlib.sha256()
    for _, value in sorted(masters.items()):
        found.update(value.contiguous().cpu().numpy().tobytes())
    return found.hexdigest()
