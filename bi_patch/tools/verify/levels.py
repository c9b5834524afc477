"""The levels quick, default and full as data: which axes, prompts and batch sizes verify measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bi_patch.errors import SettingError
from bi_patch.tools.verify.engine import Engine, Info, Options
from bi_patch.tools.verify.probes import (
    CROSS_PROBES,
    FEATURE_PROBES,
    ONLINE_PROBES,
    OWN_PROBES,
    PROBES,
    CrossProbe,
    Probe,
    Workload,
    config,
    needs_length,
)

_AROUND_256 = (255, 256, 257)


@dataclass(frozen=True)
class Level:
    """How much verify measures.

    own, cross, features: the probes besides those of the base engine. lengths, generate, long, prefix: tokens of the
    prompts (see Workload). sizes: numbers of concurrent requests. score_sizes: the same for the axes of prompt logprobs
    and sampling, empty for `sizes`. graphs: for how many captured graph sizes n to add batches of n and n + 1.
    one_engine: one further engine has all changed options, instead of one engine for each change. seconds: the time
    limit, None for no limit; verify does not start an axis that would exceed the limit. cpu_seconds: the same on a CPU.
    expected: what a run takes, in words.
    """

    name: str
    own: tuple[Probe, ...]
    cross: tuple[CrossProbe, ...]
    features: tuple[Probe | CrossProbe, ...]
    lengths: tuple[int, ...]
    generate: int
    sizes: tuple[int, ...]
    filler_lengths: tuple[int, ...]
    long: int
    prefix: int
    max_model_len: int
    graphs: int
    score_sizes: tuple[int, ...] = ()
    one_engine: bool = False
    seconds: float | None = None
    cpu_seconds: float | None = None
    expected: str = ""

    def holds(self, probe: Probe | CrossProbe) -> bool:
        return probe in (*PROBES, *ONLINE_PROBES, *self.own, *self.cross, *self.features)

    def seconds_on(self, platform: str) -> float | None:
        return self.cpu_seconds if platform == "cpu" else self.seconds


def _crossing(*names: str) -> tuple[CrossProbe, ...]:
    return tuple(next(probe for probe in CROSS_PROBES if probe.name == name) for name in names)


QUICK = Level(
    "quick",
    own=(),
    cross=_crossing("preemption", "restart", "eager and compiled"),
    features=(),
    lengths=(3, 40, 290),
    generate=5,
    sizes=(2, 17, 64, 257),
    filler_lengths=(2, 5, 9, 17),
    long=900,
    prefix=200,
    max_model_len=1024,
    graphs=2,
    score_sizes=(17, 64),
    one_engine=True,
    seconds=170.0,
    cpu_seconds=110.0,
    expected="at most 2 minutes for SmolLM2-135M on two CPU cores, 3 for an 8B model on an H100",
)
DEFAULT = Level(
    "default",
    own=OWN_PROBES,
    features=(),
    lengths=(3, 37, 150, 411),
    generate=12,
    cross=_crossing("preemption", "restart", "prefix cache off", "eager and compiled"),
    sizes=(1, 2, 3, 4, 5, 8, 13, 16, 17, 32, 33, 64, *_AROUND_256),
    filler_lengths=(2, 5, 9, 17, 33, 64, 120),
    long=1800,
    prefix=400,
    max_model_len=2048,
    graphs=12,
    expected="about 10 minutes for SmolLM2-135M, compiled, on two CPU cores",
)
FULL = Level(
    "full",
    own=OWN_PROBES,
    cross=CROSS_PROBES,
    features=FEATURE_PROBES,
    lengths=(3, 37, 150, 411, 1030),
    generate=16,
    sizes=(*range(1, 18), 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 192, *_AROUND_256),
    filler_lengths=(2, 5, 9, 17, 33, 64, 120, 257),
    long=3000,
    prefix=600,
    max_model_len=4096,
    graphs=1000,
    expected="about 3 minutes for a tiny model, eager, on two CPU cores; up to hours for a large model",
)
LEVELS = {level.name: level for level in (QUICK, DEFAULT, FULL)}  # each level holds the axes of the levels before it
_ASKED = {QUICK.name: "--quick", DEFAULT.name: "the default level", FULL.name: "--full"}


def named(name: str) -> Level:
    """The level of this name. Raises SettingError for an unknown name."""
    if name not in LEVELS:
        raise SettingError(f"there is no level {name!r}; the levels are {', '.join(LEVELS)}")
    return LEVELS[name]


def beyond(level: Level, probe: Probe | CrossProbe) -> str:
    """A text that names the smallest level above `level` that measures the probe."""
    larger = list(LEVELS.values())[list(LEVELS).index(level.name) + 1 :]
    return f"{next(_ASKED[other.name] for other in larger if other.holds(probe))} measures it"


SEQUENCES = 264  # enough for 257 concurrent requests and the edge of a captured graph


def options(level: Level, model: str, **changes: object) -> Options:
    """The base engine's options. changes: the user's options, which take precedence."""
    most = longest(model)
    length = min(level.max_model_len, most) if most else level.max_model_len
    base = Options(
        model,
        dtype="auto",
        max_model_len=length,
        max_num_seqs=SEQUENCES,
        chunk=None,
        tokenizer=has_tokenizer(model),
        eager=False,
    )
    return base.but(**changes)


def longest(model: str) -> int | None:
    """The longest context that a local folder's config.json allows; None when the file does not state it."""
    held = config(model)
    found = held.get("max_position_embeddings") or (held.get("text_config") or {}).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def has_tokenizer(model: str) -> bool:
    """False only for a local folder without any tokenizer file."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return True
    return any(folder.glob("tokenizer*")) or (folder / "tekken.json").is_file() or any(folder.glob("*.model"))


def has_weights(model: str) -> bool:
    """False only for a local folder without any weight file."""
    folder = Path(model).expanduser()
    return not folder.is_dir() or any(any(folder.glob(p)) for p in ("*.safetensors", "*.bin", "*.pt", "*.gguf"))


def workload(level: Level, engine: Engine, clients: int = 0) -> Workload:
    """The level's prompts and batch sizes, as far as the engine can hold them. clients: see Workload."""
    info, room = engine.info, engine.options.max_model_len - 2 * level.generate - 2
    block = info.block_size
    lengths = [n for n in level.lengths if n <= room]
    if max(lengths, default=0) <= 2 * block and 2 * block + 1 <= room:
        lengths.append(2 * block + 1)  # the prefix cache keeps whole blocks only
    most = engine.options.max_num_seqs
    sizes = [n for n in sorted({*level.sizes, *edges(info, level.graphs, most)}) if n <= most]
    return Workload.random(
        info.vocab_size,
        lengths=lengths,
        generate=level.generate,
        sizes=sizes,
        fillers=max([63, *sizes]),
        filler_lengths=[n for n in level.filler_lengths if n <= room] or [2],
        long=0 if needs_length(engine) else min(level.long, room - 2),
        prefix=min(level.prefix, room - 24),
        clients=clients,
        score_sizes=[n for n in level.score_sizes if n <= most],
    )


def edges(info: Info, count: int, most: int) -> Sequence[int]:
    """At most `count` captured graph sizes of up to `most` rows, evenly chosen, and each size plus one row."""
    captured = tuple(n for n in info.capture_sizes if n <= most)
    if not captured or not count:
        return ()
    step = max(1, -(-len(captured) // count))
    chosen = captured[::-1][::step]
    return sorted({n for size in chosen for n in (size, size + 1)})
