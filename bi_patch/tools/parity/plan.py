"""What parity samples, trains and compares."""

from __future__ import annotations

import msgspec

# Short and long texts: the long ones cross the leaves of attention and the blocks of the KV cache.
TEXTS = (
    ("The number of the house is", 1),
    ("Once upon a time, in a small village by the sea,", 1),
    ("The lighthouse keeper climbed the stairs every evening, and the light was the same as before. ", 7),
    ("In the year 1969 the first people walked on the moon, and everyone watched. ", 16),
)
PROMPTS = (
    "The number of the house is",
    "My favourite numbers are",
    "In the year",
    "The price of the book is",
)  # of GRPO
KINDS = (  # kinds of sampling whose processed logprobs the trainer computes again
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 50},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.8},
)


class Line(msgspec.Struct, frozen=True):
    """One line of the report. about: what is compared, for users. seconds: on a tiny model."""

    name: str
    about: str
    seconds: float


LINES = (
    Line("alone", "the trainer's logprobs of sampled tokens, one sequence at a time", 3.0),
    Line("padded right", "the same, in one batch padded on the right", 1.0),
    Line("padded left", "the same, in one batch padded on the left", 1.0),
    Line("packed", "the same, packed into one row", 1.0),
    Line("chunked head", "the same, with logits for 7 rows at a time", 1.0),
    Line("checkpointing", "the same, in training mode with gradient checkpointing", 1.0),
    Line("sampling", "processed logprobs of six kinds of temperature, top-k and top-p", 2.0),
    Line("weight update", "the sampler with new weights against the trainer with these weights, and back again", 3.0),
    Line("gradients", "gradients of other cuts into micro-batches, and of one cut twice", 5.0),
    Line("GRPO", "the trainer's logprobs of each step's rollout, in two runs", 15.0),
    Line(
        "GRPO rerun",
        "rewards, gradient norms and master weights of the two runs, which have other micro-batches and batch sizes",
        0.5,
    ),
)
NAMES = tuple(line.name for line in LINES)


class Plan(msgspec.Struct, frozen=True):
    """The sizes of a run.

    steps: GRPO steps of each run. micro: sequences in a micro-batch, for each run; the line `GRPO rerun` needs two.
    seats: the most requests that the sampler runs together, for each run. group: answers to one prompt.
    tokens: tokens in an answer. temperature, top_k, top_p: of the sampler in GRPO; other values than 1, 0 and 1 compare
    processed logprobs. updates: weight updates. cuts: micro-batches whose gradients are compared, as lists of sizes.
    rate: the learning rate. fault: the planted fault, "" for none.
    folder: where a run of GRPO keeps its checkpoint and its progress, "" for nowhere. A run whose checkpoint is there
    goes on from it. seconds: a run of GRPO stops after the first step that ends later than this; 0 for never.
    """

    steps: int = 6
    micro: tuple[int, ...] = (24, 5)
    seats: tuple[int, ...] = (64, 7)
    group: int = 6
    tokens: int = 24
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    updates: int = 2
    cuts: tuple[tuple[int, ...], ...] = ((8,), (1,) * 8, (3, 5), (2, 2, 4))
    rate: float = 2e-5
    fault: str = ""
    folder: str = ""
    seconds: float = 0.0

    @property
    def processed(self) -> bool:
        """Whether the sampler's logprobs are those after temperature, top-k and top-p."""
        return (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0)

    @property
    def transforms(self) -> dict[str, float]:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p} if self.processed else {}


LINE, RUNS = "parity line", "parity runs"  # the instruments of parity's process


class Ask(msgspec.Struct, frozen=True):
    """Measure one line. locate: look for the first operation that differs."""

    line: str
    plan: Plan
    locate: bool = True


class Step(msgspec.Struct, frozen=True):
    """One GRPO step. reward: mean over all answers. norm: of the gradient. kl: k3 of sampler and trainer, a token.
    masters: a checksum of all master weights' bits after the step."""

    reward: float
    norm: float
    kl: float
    compared: int
    differing: int
    masters: str = ""


class Spent(msgspec.Struct, frozen=True):
    """Seconds of one GRPO step. sample: the rollout. train: forward, comparison and backward. update: the optimizer.
    sync: new weights for the sampler."""

    sample: float
    train: float
    update: float
    sync: float

    @property
    def total(self) -> float:
        return self.sample + self.train + self.update + self.sync


class Run(msgspec.Struct, frozen=True):
    """One GRPO run. micro: sequences in a micro-batch. seats: requests that the sampler ran together. masters: SHA-256
    of the master weights' bits after the last step. spent: the seconds of each step. calls: in how many calls, each
    with an engine of its own, the steps were made."""

    micro: int
    seats: int
    steps: list[Step]
    masters: str
    spent: list[Spent] = []
    calls: int = 1
