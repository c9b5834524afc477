"""Axes across engines: chunk budgets, no prefix cache, preemption, eager against compiled, restart, features."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

from bi_patch.platforms.features import table
from bi_patch.platforms.features.model import REFUSED, TITLES
from bi_patch.platforms.features.speculation import OWN_HEADS
from bi_patch.tools.models import drafts
from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.engine import PREEMPTIONS, Engine
from bi_patch.tools.verify.probes import images
from bi_patch.tools.verify.probes.base import Change, NotExercised, Workload, config

DRAFTED, ACCEPTED = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"  # counters


def everything(engine: Engine, workload: Workload) -> list[Request]:
    """One batch of the long prompt and every subject: greedy, sampled, and with prompt logprobs."""
    subjects = range(len(workload.subjects))
    digest = engine.options.digests
    requests = [workload.greedy(i).but(digest=digest) for i in subjects]
    requests += [workload.greedy(i).but(temperature=0.7, top_p=0.95, seed=i) for i in subjects]
    requests += [workload.greedy(i).but(prompt_logprobs=0) for i in subjects]
    if workload.long is not None:
        requests.append(Request(workload.long, max_tokens=workload.generate, prompt_logprobs=0, digest=digest))
    return requests + _with_images(engine, workload)


def _with_images(engine: Engine, workload: Workload) -> list[Request]:
    """Requests with images, none for an engine that takes none."""
    if images.missing(engine):
        return []
    return [request for request in images.subjects(engine, workload).values() if request.images]


def chunk_changes(engine: Engine) -> list[Change]:
    whole = engine.options.max_model_len
    most = min(64, engine.options.max_num_seqs)
    budgets = [b for b in (64, 256, 1000) if b != engine.options.chunk]
    off, words = {"chunk": max(whole, engine.options.max_num_seqs), "chunked": False}, "chunked prefill off"
    if engine.info.chunks and engine.options.prefix_caching:
        off, words = off | {"prefix_caching": False}, "chunked prefill and prefix cache off"
    return [
        *(Change(f"chunks of {b} tokens", {"chunk": b, "max_num_seqs": min(most, b)}) for b in budgets),
        Change(words, off),
    ]


def needs_parts(engine: Engine) -> str:
    return "the model's prompts are computed whole, in one step" if engine.info.whole else ""


def uncached(engine: Engine) -> list[Change]:
    return [Change("no prefix cache", {"prefix_caching": False})]


_CROSSING = 16  # tokens that a request generates while it grows into its second block


def blocks_for_one(engine: Engine) -> int:
    """The blocks of the smallest KV cache that holds one request of max_model_len; one block is vLLM's null block.

    In a model with sliding windows, every KV group takes its own blocks for the request.
    """
    return (engine.info.kv_longest or engine.info.blocks(engine.options.max_model_len)) + 1


def few_blocks(engine: Engine) -> list[Change]:
    """With recurrent layers also no more sequences than blocks, which vLLM asks for before it captures CUDA graphs."""
    blocks = blocks_for_one(engine)
    fewer = {"max_num_seqs": min(blocks, engine.options.max_num_seqs)} if engine.info.chunks else {}
    return [Change("few KV blocks", {"kv_blocks": blocks} | fewer)]


def crossing_blocks(engine: Engine, workload: Workload) -> list[Request]:
    """Requests that each need a second KV block soon after their prompt: together, more blocks than the cache has.
    Requests with images come last, so that they are preempted first. Both engines get the same requests, so the number
    does not follow max_num_seqs."""
    block, follows = engine.info.block_size, engine.options.digests
    source = random.Random(7)
    count = blocks_for_one(engine) // engine.info.blocks(1) + 4
    limit = engine.info.vocab_size - engine.info.vocab_size // 16
    made = [
        Request(
            tuple(source.randrange(limit) for _ in range(block - 4 - i % 3)),
            max_tokens=_CROSSING,
            logprobs=3,
            digest=engine.options.digests,
            first=20 * i if follows and i % 2 else None,  # a logits processor must know its place after a preemption
        )
        for i in range(count)
    ]
    return made + [r.but(max_tokens=_CROSSING) for r in _with_images(engine, workload)]


def needs_crossing(engine: Engine) -> str:
    length, sequences, block = engine.options.max_model_len, engine.options.max_num_seqs, engine.info.block_size
    if length < block + _CROSSING:
        return f"max_model_len is {length}: no request outgrows a KV block of {block} tokens"
    if sequences * engine.info.blocks(block + 1) < blocks_for_one(engine):  # one block is not for requests
        return f"max_num_seqs is {sequences}: so few requests never need more KV blocks than one long request"
    return ""


def preempted(change: Change, counted: dict[str, float]) -> None:
    if counted.get(PREEMPTIONS, 0.0) <= 0:
        raise NotExercised("preemption: the engine's counter of preemptions did not move; give it fewer KV blocks")


def compiled(engine: Engine) -> list[Change]:
    other = "compiled" if engine.options.eager else "eager"
    changes = [Change(other, {"eager": not engine.options.eager})]
    if engine.info.capture_sizes:
        extra = {**engine.options.extra, "compilation_config": {"cudagraph_mode": "NONE"}}
        changes.append(Change("compiled, no graphs", {"extra": extra}))
    return changes


def threads(engine: Engine) -> list[Change]:
    """An uneven number of threads, so that every thread's share of the rows and the columns moves."""
    count = 3 if engine.info.threads != 3 else 2
    return [Change(f"{count} threads", {"threads": count})]


def needs_threads(engine: Engine) -> str:
    return "" if engine.info.platform == "cpu" else "the threads of the host compute nothing on a GPU"


def restarted(engine: Engine) -> list[Change]:
    return [Change("new process, empty caches", {}, fresh=True)]


# Each kind uses another part of the sampler. The engine draws from few tokens, so that drafts are accepted.
_REPEATED = (
    {},
    {"temperature": 0.6, "top_k": 2, "logprobs": 0},
    {"temperature": 0.3, "top_p": 0.4},
    {"allowed": (11, 12, 13, 14)},
    {"allowed": (11, 12, 13), "temperature": 1.0},
    {"temperature": 0.5, "top_k": 3, "repetition_penalty": 1.05, "presence_penalty": 0.1},
    {"asked": (3, 5, 7)},
    {"prompt_logprobs": 0},
)


def repeating(engine: Engine, workload: Workload) -> list[Request]:
    """Prompts with repeated n-grams, so that the n-gram proposer has something to propose, and prompts with images.

    Beside speculation, vLLM has no custom logits processors, so no request asks for digests, and model runner V2 has no
    logprobs of given tokens.
    """
    return [
        Request(
            (workload.subjects[i % len(workload.subjects)][:20] * 4)[: 20 + i],
            max_tokens=3 * workload.generate,
            **{"logprobs": 3, **kind},
            **({"seed": 9 + i} if "temperature" in kind else {}),
        )
        for i, kind in enumerate(2 * _REPEATED)
        if engine.info.platform == "cpu" or "asked" not in kind
    ] + [request.but(max_tokens=3 * workload.generate, digest=False) for request in _with_images(engine, workload)]


def speculative(engine: Engine) -> list[Change]:
    """N-grams with a single draft, with some, and with more than the engine accepts at once. Also a draft model and
    heads, where they can be made of the model's weights, the model's own heads (MTP), and suffixes, where their library
    is installed."""

    def change(what: str, count: int, **given: object) -> Change:
        asked = {**given, "num_speculative_tokens": count}
        label = f"{what} with {count} drafts"
        return Change(label, {"digests": False, "extra": {**engine.options.extra, "speculative_config": asked}})

    lookup = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    found = [change("n-gram speculation", count, **lookup) for count in (1, 3, 8)]
    if find_spec("arctic_inference") is not None and _takes(engine, _SUFFIXES):
        found.append(change("speculation by suffixes", 4, method="suffix"))
    if drafts.serves(engine.options.model) and _takes(engine, _HEADS):
        for method, count in zip(drafts.METHODS, (2, 3, 4)):
            found.append(change(f"speculation by {method}", count, method=method, model=_drafts(engine, method)))
    model = config(engine.options.model)
    own = model.get("num_nextn_predict_layers") and set(model.get("architectures") or ()) <= OWN_HEADS
    if own and _takes(engine, _OWN):
        found += [change("speculation by mtp", count, method="mtp") for count in (1, 3)]
    return found


# Rows of the feature table, by the beginnings of their names.
_HEADS = "speculative decoding with a draft model or heads"
_SUFFIXES = "speculative decoding with suffixes"
_OWN = "speculative decoding with a model's own heads"


def _takes(engine: Engine, name: str) -> bool:
    """Whether bi_patch serves a row's drafts on the engine's platform and release, and beside its features."""
    if engine.options.extra.get("enable_lora"):
        return False
    release = Version(engine.info.vllm)
    rows = (row for row in table.ROWS if row.name.startswith(name))
    known = engine.info.mode == "armed" and engine.info.platform in TITLES
    return known and all(row.cell(engine.info.platform, release).state != REFUSED for row in rows)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """A folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="bi_patch-drafts-", ignore_cleanup_errors=True)


def _drafts(engine: Engine, method: str) -> str:
    folder = Path(_folder().name) / Path(engine.options.model).name / method
    return str(folder if folder.exists() else drafts.write(method, engine.options.model, folder))


def speculated(change: Change, counted: dict[str, float]) -> None:
    drafted, accepted = counted.get(DRAFTED, 0.0), counted.get(ACCEPTED, 0.0)
    if not 0 < accepted < drafted:
        raise NotExercised(
            f"speculative decoding: the engine accepted {accepted:.0f} of {drafted:.0f} drafts; some must be accepted, "
            "and some rejected"
        )


_RANKS_OF_A_CPU = 4  # ranks of one CPU share its cores


def parallel(engine: Engine) -> Sequence[Change]:
    heads = config(engine.options.model).get("num_attention_heads") or 0
    most = _RANKS_OF_A_CPU if engine.info.platform == "cpu" else engine.info.devices
    if engine.info.mode == "armed":
        most = min(most, engine.info.leaves)
    given = engine.options.extra
    own = int(given.get("tensor_parallel_size", 1))
    sizes = [n for n in (1, 2, 4, 8) if n <= most and n != own and not heads % n]
    return [Change(f"tensor parallel {n}", {"extra": {**given, "tensor_parallel_size": n}}) for n in sizes]


def needs_devices(engine: Engine) -> str:
    if engine.info.platform != "cpu" and engine.info.devices < 2:
        return "the host has one device"
    if engine.info.mode == "armed" and not engine.info.leaves:
        return (
            "bi_patch promises equal bits for different numbers of ranks only with BI_PATCH_TP_INVARIANT=8; to verify "
            "the other axes on two ranks, give --engine-arg tensor_parallel_size=2"
        )
    return "" if parallel(engine) else "the model's attention heads cannot be divided among 2, 4 or 8 ranks"
