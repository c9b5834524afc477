"""How much the demo measures: the axes and batch sizes, and its prompts as a workload of verify."""

from __future__ import annotations

from bi_patch.tools.demo import prompts
from bi_patch.tools.verify.engine import Engine
from bi_patch.tools.verify.levels import Level
from bi_patch.tools.verify.probes import Workload

CHUNK = 256  # tokens per engine step: so few that the longest prompts are computed in several chunks

_QUICK_SUBJECTS = ("keeper", "harbour", "minutes")
_QUICK_AXES = ("batch size", "prefix cache", "prompt logprobs")
# Axis of verify -> what the axis does to a prompt, for readers who do not know verify.
ABOUT = {
    "batch size": "the prompt runs in batches of several sizes",
    "position and order": "the prompt is the last of nine requests, and the others change their order",
    "prefix cache": "the prompt's beginning is cached, wholly or in part, alone and in a batch",
    "chunk budget": "the prompt is computed in steps of 64 tokens, alone and in a batch",
    "prompt logprobs": "the engine returns log probabilities of the prompt's own tokens, in batches",
    "seeded sampling": "the answer is sampled with a fixed seed, temperature 0.7 and top-p 0.95, in batches",
}


def level(quick: bool = False) -> Level:
    """A level of verify with one engine and no time limit. `workload` makes the prompts, so no lengths are stated."""
    return Level(
        "demo, quick" if quick else "demo",
        own=(),
        cross=(),
        features=(),
        lengths=(),
        generate=16 if quick else 18,
        sizes=(2, 16) if quick else (2, 5, 16, 40),
        score_sizes=(16,) if quick else (2, 16),
        filler_lengths=(),
        long=0,
        prefix=0,
        max_model_len=2048,
        graphs=0,
    )


def axes(quick: bool = False) -> tuple[str, ...]:
    """The names of the axes that the demo measures, in the order in which verify measures them."""
    return _QUICK_AXES if quick else tuple(ABOUT)


def subjects(quick: bool = False) -> tuple[prompts.Subject, ...]:
    """The prompts whose answers are compared."""
    return tuple(s for s in prompts.SUBJECTS if not quick or s.name in _QUICK_SUBJECTS)


def workload(engine: Engine, quick: bool = False) -> Workload:
    """The demo's texts as token ids of the engine's model."""
    chosen, held = subjects(quick), level(quick)
    return Workload(
        subjects=tuple(engine.encode(s.text) for s in chosen),
        fillers=tuple(engine.encode(text) for text in prompts.FILLERS),
        labels=tuple(s.name for s in chosen),
        generate=held.generate,
        sizes=held.sizes,
        score_sizes=held.score_sizes,
        places=(8,),
        budgets=(64,),
    )
