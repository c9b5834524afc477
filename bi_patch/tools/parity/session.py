"""One process with a sampler and a trainer of the same weights: sampling, and the trainer's logprobs of the samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from bi_patch.tools.parity.plan import PROMPTS, TEXTS, Plan, Run
from bi_patch.tools.parity.trainers import Trainer
from bi_patch.tools.verify.answers import Answer, Difference, Request, compare
from bi_patch.tools.verify.engine import LocalEngine


@dataclass(frozen=True)
class Sample:
    """A prompt, the sampled tokens, and the sampler's logprob of each of them."""

    prompt: tuple[int, ...]
    answer: Answer

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.answer.tokens]


@dataclass
class Session:
    """The sampler and the trainer. samples: of the first line, reused by later lines with the same weights.

    runs: the runs of GRPO, each with its master weights in fp32. looking: the sample that was compared last, and
    whether its logprobs are those after other transforms than temperature 1; None on lines without samples.
    """

    engine: LocalEngine
    trainer: Trainer
    plan: Plan
    samples: list[Sample] = field(default_factory=list)
    runs: list[tuple[Run, dict[str, torch.Tensor]]] = field(default_factory=list)
    looking: tuple[Sample, bool] | None = None

    def prompts(self) -> list[tuple[int, ...]]:
        """Short and long prompts as token ids, at most half of the engine's length each."""
        return self._encoded([text * times for text, times in TEXTS])

    def short_prompts(self) -> list[tuple[int, ...]]:
        """The prompts of GRPO."""
        return self._encoded(PROMPTS)

    def _encoded(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        longest = self.engine.info.max_model_len // 2
        if self.engine.options.tokenizer:
            return [self.engine.encode(text)[:longest] for text in texts]
        draw = torch.Generator().manual_seed(0)
        vocab = self.engine.info.vocab_size
        return [
            tuple(torch.randint(0, vocab, (min(len(text) // 4 + 1, longest),), generator=draw).tolist())
            for text in texts
        ]

    @contextlib.contextmanager
    def seated(self, requests: int) -> Iterator[None]:
        """Within this block, the sampler runs at most this many requests together."""
        scheduler = self.engine.core.scheduler
        # vLLM 0.32 and later admit by a number of its own.
        name = "max_num_active_reqs" if hasattr(scheduler, "max_num_active_reqs") else "max_num_running_reqs"
        before = getattr(scheduler, name)
        setattr(scheduler, name, min(requests, before))
        try:
            yield
        finally:
            setattr(scheduler, name, before)

    def sample(self, prompts: Sequence[tuple[int, ...]], *, seed: int, tokens: int, **kind: float) -> list[Sample]:
        """Sample an answer to each prompt, all together. kind: temperature, top_k, top_p; by default temperature 1."""
        asked = [
            Request(prompt, max_tokens=tokens, seed=seed + i, **{"temperature": 1.0, **kind})
            for i, prompt in enumerate(prompts)
        ]
        return [Sample(request.prompt, answer) for request, answer in zip(asked, self.engine.generate(asked))]

    def first_samples(self) -> list[Sample]:
        """Two answers to each prompt, made once for the weights as loaded."""
        if not self.samples:
            self.engine.reset_cache()
            self.samples = self.sample(self.prompts() * 2, seed=100, tokens=2 * self.plan.tokens)
        return self.samples

    def compared(
        self, samples: Sequence[Sample], own: Sequence[torch.Tensor], label: str, **kind: float
    ) -> Iterator[tuple[str, Difference]]:
        """(label, Difference) for each sample. own: the trainer's logprobs of the sampled tokens, fp32. kind: how the
        tokens were sampled."""
        for at, (sample, logprobs) in enumerate(zip(samples, own, strict=True)):
            self.looking = sample, bool(kind) and kind != {"temperature": 1.0}
            yield f"{label}, sample {at}", difference(sample.answer, logprobs, f"{label}, sample {at}")


def difference(answer: Answer, own: torch.Tensor, label: str) -> Difference:
    """Compare the sampler's logprobs of an answer with the trainer's own [tokens] fp32, bit by bit."""
    return compare(Answer(answer.tokens, answer.logprobs), Answer(answer.tokens, own.tolist()), label)


def k3(answer: Answer, own: torch.Tensor) -> float:
    """The sum over tokens of exp(r) - 1 - r, with r the trainer's logprob minus the sampler's."""
    r = own.double().cpu() - torch.tensor(answer.logprobs, dtype=torch.float64)
    return float((r.exp() - 1 - r).sum())
