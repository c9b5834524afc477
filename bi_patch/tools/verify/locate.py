"""Finds where a difference begins: runs a Case's pair again, traces both sides, and names the first op that differs.

    located = locate(case, system.options, system.start)    # starts engines; None when the pair does not differ again
    located = locate_on(engine, case)                       # on a running engine

The traced engine runs eagerly. If the difference is gone in eager mode, the pair runs again compiled. The ops inside
compiled code cannot be traced, so only its results are compared: each layer's keys and values, the last hidden states,
logits and logprobs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import msgspec

from bi_patch.errors import BiPatchError
from bi_patch.tools.verify.align import Compared, First, compare
from bi_patch.tools.verify.answers import Answer, Difference, Request
from bi_patch.tools.verify.answers import compare as compare_answers
from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.child import ChildEngine
from bi_patch.tools.verify.engine import Options
from bi_patch.tools.verify.instruments import ADAPTERS, COMPILED, PARTS, PREFIX, TraceAsk, Traced
from bi_patch.tools.verify.trace import CACHE, MODULE, RETURNED, SAMPLE, Call, Trace


class Located(msgspec.Struct, frozen=True):
    """The first operation whose result differs.

    module: the path in the model, e.g. "model.layers.0.mlp.down_proj". op: e.g. "bi_cpu.gemm", or the module's class
    when only the module's output differs and none of its ops. position: absolute position of the first token whose row
    differs. shape_*, m_*: the shape of the op's output, and its number of rows, on each side. kernel_*: the kernel
    that ran. seam: the op's seam, "" for none. seam_status: closed, open or not needed here. only_*: ops that ran on
    this side only, right before. reproduced: the answers differed again. compiled: only compiled code differs.
    """

    module: str
    op: str
    seam: str
    seam_status: str
    position: int
    phase: str
    shape_alone: tuple[int, ...] = ()
    shape_company: tuple[int, ...] = ()
    m_alone: int = 0
    m_company: int = 0
    dtype: str = ""
    kernel_alone: str = ""
    kernel_company: str = ""
    only_alone: tuple[str, ...] = ()
    only_company: tuple[str, ...] = ()
    reproduced: bool = True
    compiled: bool = False
    note: str = ""

    @property
    def kernel(self) -> str:
        """The kernel's name; the names of both sides where they ran different kernels."""
        if self.kernel_alone == self.kernel_company:
            return self.kernel_alone
        sides = ((self.kernel_alone, "alone"), (self.kernel_company, "in company"))
        return ", ".join(f"{kernel} {side}" for kernel, side in sides if kernel)

    def words(self) -> str:
        """A description of a few lines, for a report."""
        where = self.module or "outside the model"
        owner = f"patch point {self.seam}, {self.seam_status or 'not in this process'}" if self.seam else ""
        lines = [f"{where}: {self.op} differs first, at token {self.position} ({owner or 'no patch point'})"]
        if self.shape_alone:
            lines.append(
                f"M={self.m_alone} alone, M={self.m_company} in company; "
                f"{self.dtype} {list(self.shape_alone)} and {list(self.shape_company)}"
            )
        if self.kernel:
            lines.append(f"computed by {self.kernel}")
        for side, ops in (("alone", self.only_alone), ("in company", self.only_company)):
            if ops:
                lines.append(f"ran only {side}: {', '.join(ops)}")
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


Start = Callable[[Options], AbstractContextManager[ChildEngine]]


def locate(case: Case, options: Options, start: Start) -> Located | None:
    """Run the pair of `case` again with traces, on new engines.

    options: the base engine's. start: starts an engine with given options, for example `System.start` or
    `functools.partial(ChildEngine, ARMED)`. Returns None when the answers do not differ again. Raises what `start`
    raises.
    """

    def begin(scenario: Scenario, eager: bool) -> AbstractContextManager[ChildEngine]:
        return start(options.but(**{**scenario.options, "eager": eager}))

    both = case.on_one_engine
    eager = [s.options.get("eager", options.eager) for s in (case.alone, case.company)]
    found = None
    if eager[0] == eager[1]:
        found = _both(case, lambda s: begin(s, True), both, coarse=False)
    if found is None and not all(eager):
        found = _both(case, lambda s: begin(s, s.options.get("eager", options.eager)), both, coarse=True)
    return found


def locate_on(engine: ChildEngine, case: Case) -> Located | None:
    """Like locate, on a running engine. The scenarios' `options` and `fresh` are ignored."""
    return _on(engine, engine, case, coarse=not engine.options.eager)


def _both(
    case: Case, begin: Callable[[Scenario], AbstractContextManager[ChildEngine]], together: bool, coarse: bool
) -> Located | None:
    if together:
        with begin(case.alone) as engine:
            return _on(engine, engine, case, coarse)
    sides = []
    for scenario in (case.alone, case.company):
        with begin(scenario) as engine:  # one after the other: two engines may not fit on one device
            sides.append(trace(engine, scenario, coarse))
    return judge(case, *sides, coarse)


def _on(first: ChildEngine, second: ChildEngine, case: Case, coarse: bool) -> Located | None:
    alone = trace(first, case.alone, coarse)
    company = trace(second, case.company, coarse)
    located = judge(case, alone, company, coarse)
    if located is not None and not coarse and first.info.platform != "cpu" and "." in located.op:
        with contextlib.suppress(BiPatchError):  # the op is found already; the profiler adds only its kernels' names
            located = _with_kernels(first, second, case, located)
    return located


def trace(
    engine: ChildEngine, scenario: Scenario, coarse: bool = False, watch: tuple[str, str] | None = None
) -> Traced:
    """Trace the target in a scenario. The trace includes the part of the warm-up that computed the target's prefix."""
    engine.reset_cache()
    if scenario.chunk is not None:
        engine.set_chunk(scenario.chunk)
    if scenario.scores is not None:
        engine.set_logprobs(scenario.scores)
    calls: list[Call] = []
    statuses: dict[str, str] = {}
    try:
        for batch in scenario.warmup:
            index, shared = max(
                ((i, _shared(r, scenario.request)) for i, r in enumerate(batch)), key=lambda p: p[1], default=(0, 0)
            )
            if not shared or scenario.updates:  # other weights computed the prefix
                engine.generate(batch)
                continue
            warm = _ask(engine, TraceAsk(batch, index, watch, coarse))
            calls += _before(warm.trace.calls, shared, len(calls))
            statuses |= warm.statuses
        for update in scenario.updates:
            engine.ask("update", msgspec.msgpack.encode(update))
        if scenario.pause is not None:
            engine.ask("pause", msgspec.msgpack.encode(scenario.pause))
        traced = _ask(engine, TraceAsk(scenario.requests, scenario.index, watch, coarse))
    finally:
        if scenario.chunk is not None:
            engine.set_chunk(None)
        if scenario.scores is not None:
            engine.set_logprobs(None)
    offset = max((c.step for c in calls), default=-1) + 1
    own = [msgspec.structs.replace(c, step=c.step + offset) for c in traced.trace.calls]
    return Traced(traced.answer, Trace([*calls, *own], coarse), statuses | traced.statuses)


def _shared(warm: Request, request: Request) -> int:
    """The length of the common prefix of two prompts."""
    pairs = zip(warm.prompt, request.prompt)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(warm.prompt), len(request.prompt)))


def _before(calls: list[Call], end: int, offset: int) -> list[Call]:
    """The warm-up's rows of positions before `end`, without sampling: the warm-up may sample another token."""
    from bi_patch.tools.verify.trace import WIDTH

    kept = []
    base = offset and 1_000_000 + offset  # so that different runs have different step numbers
    for call in calls:
        rows = min(call.rows, end - call.position)
        if rows > 0 and call.phase not in (SAMPLE, RETURNED):
            kept.append(msgspec.structs.replace(call, step=call.step + base, digests=call.digests[: rows * WIDTH]))
    return kept


def _ask(engine: ChildEngine, ask: TraceAsk) -> Traced:
    return msgspec.msgpack.decode(engine.ask("trace", msgspec.msgpack.encode(ask)), type=Traced)


def difference(case: Case, alone: Answer, company: Answer) -> Difference:
    """The difference between two answers to a Case's pair, compared as the Case compares them."""
    if case.part == "decode":
        count = len(alone.tokens)
        alone = Answer(alone.tokens, alone.logprobs)
        company = Answer(alone.tokens, company.prompt_logprobs[-count:])
    return compare_answers(alone, company, case.label)


def judge(case: Case, alone: Traced, company: Traced, coarse: bool = False) -> Located | None:
    """Where two traced sides of a pair part, or None when they do not part."""
    again = difference(case, alone.answer, company.answer)
    compared = compare(alone.trace, company.trace)
    if coarse and compared.first is not None:
        compared = _first_layer(alone.trace, company.trace) or compared
    if compared.first is None:
        if not again.differing:
            return None
        return Located(
            "",
            "no traced op",
            "",
            "",
            -1,
            "",
            reproduced=True,
            compiled=coarse,
            note=f"the answers differ ({again.first}), but all {compared.compared} compared digests are equal: the "
            "difference arises outside the model, the logits and the sampler",
        )
    if not again.differing and coarse:
        return None
    statuses = alone.statuses | company.statuses
    located = _located(compared.first, statuses, again.differing > 0, coarse)
    if case.company.updates and located.op == CACHE and not coarse:
        note, status = "other weights computed a prefix", statuses.get(PREFIX, "")
        located = msgspec.structs.replace(located, seam=PREFIX, seam_status=status, note=note)
    if _cached_for_another(case.company) and not coarse:
        note, status = "another adapter computed a prefix", statuses.get(ADAPTERS, "")
        located = msgspec.structs.replace(located, seam=ADAPTERS, seam_status=status, note=note)
    if case.company.request.parts and located.phase == SAMPLE and not coarse:
        note, status = "the draw of a part of a streamed input", statuses.get(PARTS, "")
        located = msgspec.structs.replace(located, seam=PARTS, seam_status=status, note=note)
    return located


def _cached_for_another(company: Scenario) -> bool:
    """Whether the same prompt ran with another adapter before the target."""
    asked = company.request
    return any(r.prompt == asked.prompt and r.lora != asked.lora for batch in company.warmup for r in batch)


def _first_layer(alone: Trace, company: Trace) -> Compared | None:
    """The first layer whose keys and values differ: a layer caches them before the hidden states are computed."""
    for module in dict.fromkeys(c.module for c in company.calls if c.op == CACHE):
        sides = (Trace([c for c in t.calls if c.op == CACHE and c.module == module], True) for t in (alone, company))
        compared = compare(*sides)
        if compared.first is not None:
            return compared
    return None


def _located(first: First, statuses: dict[str, str], reproduced: bool, coarse: bool) -> Located:
    a, b = first.alone, first.company
    only_alone, only_company = ([c for c in side if c.op != MODULE] for side in (first.only_alone, first.only_company))
    op, seam = b.op, b.seam or a.seam
    if a.op == MODULE:
        op = b.kind or a.kind
    other_path = [*only_company[::-1], *only_alone[::-1]]
    # An op that ran on one side only is a better name than an elementary op after it. A fused kernel is better still.
    # Best is a fused kernel whose seam is not the module's own: this kernel should not run there.
    fused = [c for c in other_path if not c.op.startswith("aten.")]
    stranger = [c for c in fused if c.seam not in ("", seam)]
    own = next(iter(stranger or fused or other_path), None)
    if own is not None and (a.op == MODULE or (b.op.startswith("aten.") and not own.op.startswith("aten."))):
        op, seam = own.op, own.seam or seam
    elif own is not None and own.op.startswith("aten.") and own.seam not in ("", seam):
        op, seam = own.op, own.seam  # the last op of the other path is another seam's, so that seam changed the row
    note = ""
    if b.op == CACHE:
        note = "keys or values already in the cache differ"
    if coarse:
        seam = COMPILED
        note = "compiled code differs; its ops cannot be traced, so each layer's keys and values were compared"
    if not reproduced:
        note = f"{note}; the final answers were equal this time".lstrip("; ")
    return Located(
        b.module,
        op,
        seam,
        statuses.get(seam, ""),
        first.position,
        b.phase,
        a.shape,
        b.shape,
        a.shape[0] if b.op != CACHE else a.rows,
        b.shape[0] if b.op != CACHE else b.rows,
        b.dtype,
        a.kernel,
        b.kernel,
        tuple(dict.fromkeys(c.op for c in only_alone)),
        tuple(dict.fromkeys(c.op for c in only_company)),
        reproduced,
        coarse,
        note,
    )


def _with_kernels(first: ChildEngine, second: ChildEngine, case: Case, located: Located) -> Located:
    """Trace both sides again and record the GPU kernels of the located op."""
    watch = (located.module, located.op)
    names = []
    for engine, scenario in ((first, case.alone), (second, case.company)):
        calls = trace(engine, scenario, False, watch).trace.calls
        mine = [c for c in calls if (c.module, c.op) == watch and 0 <= located.position - c.position < c.rows]
        names.append(mine[0].kernel if mine else "")
    return msgspec.structs.replace(located, kernel_alone=names[0], kernel_company=names[1])
