"""The axis of images: requests with made images, beside other images, after them, and with images in several steps."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from bi_patch.tools.verify.answers import Image, Request
from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.engine import HITS, SERVER, Engine
from bi_patch.tools.verify.probes.base import NotExercised, Run, Workload, pair

_MOST = 3  # images of a prompt
_TEXT = 48  # tokens of a prompt besides its images
_SIZES = ((64, 64), (200, 90), (90, 230), (400, 400))  # width, height in pixels
_FRAMES = ((64, 64), (96, 64), (64, 96), (90, 70))  # of a video
_BUDGETS = (17, 48, 130)  # tokens per engine step, besides an image that vLLM computes whole


def missing(engine: Engine) -> str:
    if engine.info.platform == SERVER:
        return "verify gives a running server no images"
    if not engine.info.images:
        return "the model takes no images"
    needed = _TEXT + _MOST * engine.info.images + 64
    if engine.options.max_model_len < needed:
        return f"max_model_len is {engine.options.max_model_len}: a prompt with {_MOST} images needs {needed}"
    return ""


def _ask(engine: Engine, load: Workload, text: int, *images: tuple[int, ...]) -> Request:
    """A request with images. text: chooses its tokens. images: (place in the text, seed) of each, and of a video also
    the number of its frames."""
    tokens = (*load.subjects[text % len(load.subjects)], *load.fillers[text], *load.fillers[text + 1])[:_TEXT]
    made = tuple(
        Image(min(at, len(tokens)), seed, *(_SIZES if not frames else _FRAMES)[seed % len(_SIZES)], *frames)
        for at, seed, *frames in images
    )
    return Request(tokens, max_tokens=load.generate, logprobs=3, digest=engine.options.digests, images=made)


def subjects(engine: Engine, load: Workload) -> dict[str, Request]:
    """The requests whose answers are compared."""
    found = {
        "one image": _ask(engine, load, 0, (2, 0)),
        "three images": _ask(engine, load, 1, (0, 1), (3, 2), (9, 3)),
        "one image twice": _ask(engine, load, 2, (1, 5), (7, 5)),
        "no image": _ask(engine, load, 3),
    }
    if engine.info.videos:
        found |= {
            "a video": _ask(engine, load, 4, (2, 20, 4)),
            "a video between images": _ask(engine, load, 5, (1, 2), (4, 21, 6), (9, 1)),
        }
    return found


def others(engine: Engine, load: Workload) -> list[Request]:
    """Requests that run beside: with other images, with a subject's images, and with none."""
    videos = [
        _ask(engine, load, 11, (3, 22, 4)),
        _ask(engine, load, 12, (0, 21, 6), (7, 23, 2)),
    ]
    return (videos if engine.info.videos else []) + [
        _ask(engine, load, 4, (0, 7), (5, 8)),
        _ask(engine, load, 5, (3, 2)),
        _ask(engine, load, 6),
        _ask(engine, load, 7, (2, 9), (4, 0), (6, 10)),
        _ask(engine, load, 8, (1, 11)),
        _ask(engine, load, 9, (0, 3), (8, 1)),
        _ask(engine, load, 10, (5, 5)),
    ]


def images(run: Run) -> Iterator[Case]:
    """Each subject in company, after requests with the same images, on warm caches, and in small steps."""
    asked, company = subjects(run.engine, run.workload), others(run.engine, run.workload)
    for label in [label for label in ("one image", "a video") if label in asked]:
        first = asked[label]
        changed = first.but(images=tuple(replace(i, seed=i.seed + 4) for i in first.images))
        if run.alone([first])[0] == run.alone([changed])[0]:
            raise NotExercised(f"images: another image in place of {label} changed nothing")
    yield from _beside(run, asked, company)
    yield from _after(run, asked, company)
    if not run.engine.info.whole:
        yield from _in_steps(run, asked, company)


def _beside(run: Run, asked: dict[str, Request], company: list[Request]) -> Iterator[Case]:
    for size in (n for n in (2, 5, 8) if n <= run.engine.options.max_num_seqs):
        for label, request in asked.items():
            for order, words in ((company, "first"), (company[::-1], "last")):
                chosen = order[: size - 1]
                place = 0 if order is company else len(chosen)
                if not run.holds([request, *chosen]):
                    continue
                text = f"{label}, {words} in a batch of {size}"
                yield run.beside(chosen[:place], request, chosen[place:], text)
    every = [r for pair_ in zip(asked.values(), company) for r in pair_]
    if len(every) <= run.engine.options.max_num_seqs and run.holds(every):
        yield from run.each(every, {2 * i: f"{label}, all in one batch" for i, label in enumerate(asked)})
        late = [r.but(delay=i % 3) for i, r in enumerate(every)]
        yield from run.each(late, {2 * i: f"{label}, images of several steps" for i, label in enumerate(asked)})


def _after(run: Run, asked: dict[str, Request], company: list[Request]) -> Iterator[Case]:
    """On caches that other requests left: of processed images, of encoded images, of keys and values."""
    counted = run.engine.counters().get(HITS, 0.0)
    for label, request in asked.items():
        (expected,) = run.alone([request])
        alone = Scenario.alone(request)
        turned = request.but(
            images=tuple(replace(held, at=place.at) for place, held in zip(request.images, request.images[::-1]))
        )
        single = [request.but(images=(image,), max_tokens=1) for image in request.images]
        warmups = {
            "again": [[request]],
            "after its images in another order": [[turned]],
            "after its images one by one": [[r] for r in single],
            "after others": [company],
        }
        for words, warmup in warmups.items():
            scenario = Scenario([request], warmup=warmup)
            yield pair(f"{label}, {words}", alone, scenario, expected, run.scenario(scenario))
    if run.engine.options.prefix_caching and run.engine.counters().get(HITS, 0.0) == counted:
        run.notes.append("no prompt with images was long enough for a cached prefix")


def _in_steps(run: Run, asked: dict[str, Request], company: list[Request]) -> Iterator[Case]:
    whole = run.engine.options.chunk or run.engine.info.max_model_len
    image = run.engine.info.images if run.engine.info.whole_images else 0
    for budget in (b + image for b in _BUDGETS if b + image < whole):
        for label, request in asked.items():
            (expected,) = run.alone([request])
            among = (
                Scenario.alone(request, chunk=budget),
                Scenario.among(company[:2], request, company[2:4], chunk=budget),
            )
            for scenario in among:
                text = f"{label}, in steps of {budget} tokens, {len(scenario.requests) - 1} others"
                yield pair(text, Scenario.alone(request), scenario, expected, run.scenario(scenario))
