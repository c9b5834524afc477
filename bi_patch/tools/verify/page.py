"""Renders a report as one HTML page with inline SVG; the page has no scripts and loads nothing."""

from __future__ import annotations

import html
from collections.abc import Sequence
from math import log1p

from bi_patch.tools.verify.report import (
    DIFFERED,
    FAILED,
    LEFT_OUT,
    NOT_APPLICABLE,
    NOT_EXERCISED,
    OUT_OF_TIME,
    PASSED,
    Axis,
    Report,
)

_FILL = {PASSED: "#bfe6cd", DIFFERED: "#ec7058", FAILED: "#f2c14e", NOT_EXERCISED: "#f2c14e", OUT_OF_TIME: "#f2c14e"}
_VERDICT = {0: "#1d7a43", 1: "#a3200d", 2: "#8a6100"}
_BINS = 120
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: .2em; } h2 { font-size: 1.1em; margin-top: 2em; } h3 { font-size: 1em; }
.note, dt { color: #5a6775; } p.verdict { font-size: 1.1em; font-weight: 600; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .25em .8em .25em 0;
       vertical-align: top; border-bottom: 1px solid #e3e6ea; } td.n, th.n { text-align: right; white-space: nowrap; }
pre { overflow-x: auto; } svg { width: 100%; height: auto; } code { font-size: .92em; overflow-wrap: anywhere; }
.state { border-radius: 4px; padding: .05em .5em; white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1em 1em; margin: .5em 0; } dd { margin: 0; }
"""


def page(report: Report, more: Sequence[str] = ()) -> str:
    """The whole page. more: further parts in HTML, after the table of numbers."""
    title = f"{report.title} {_short(report.system)}"
    measured = [axis for axis in report.axes if axis.compared or axis.state in _FILL]
    wrong = [axis for axis in measured if axis.differing]
    aside = [axis for axis in report.axes if axis not in measured]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f"<p class='verdict' style='color:{_VERDICT[report.exit_code]}'>{html.escape(report.verdict[0])}</p>",
        *(f"<p>{html.escape(said)}</p>" for said in report.verdict[1:]),
        _facts(report),
        "<h2>Axes</h2>",
        f"<p class='note'>{report.note}"
        + ("; whole rows of logits are compared by digest" if any(axis.digests for axis in report.axes) else "")
        + ". Bars: compared positions (logarithmic scale); red: positions that differ.</p>",
        bars(measured),
    ]
    if wrong:
        parts.append("<h2>Where bits differ</h2>")
        parts += [_wrong(axis) for axis in wrong]
    parts += ["<h2>Numbers</h2>", _table(measured), *more]
    if aside:
        parts += ["<h2>Not measured</h2>", _aside(aside)]
    if report.failure:
        parts.append(f"<h2>What ended the run</h2><pre>{html.escape(report.failure)}</pre>")
    parts.append("</body></html>\n")
    return "\n".join(parts)


def bars(axes: Sequence[Axis]) -> str:
    """An SVG with one bar per axis: the number of compared positions, and of those that differ."""
    left, width, row = 190, 620, 26
    most = max((axis.compared for axis in axes), default=1)
    out = [_open(left + width + 190, row * len(axes) + 8, "positions compared by axis")]
    for y, axis in enumerate(axes):
        top = y * row + 4
        length = _log(axis.compared, most) * width
        fill = _FILL.get(axis.state, "#e3e6ea")
        words = (
            f"{axis.differing:,} of {axis.compared:,} differ"
            if axis.differing
            else f"{axis.compared:,} equal"
            if axis.state == PASSED
            else axis.state
        )
        shown = f"<rect x='{left}' y='{top}' width='{max(2.0, length):.1f}' height='{row - 6}' rx='3' "
        out.append(f"<text x='{left - 10}' y='{top + 15}' text-anchor='end'>{html.escape(axis.name)}</text>")
        out.append(f"<g><title>{html.escape(axis.about)}</title>")
        out.append(shown + f"fill='{_FILL[PASSED] if axis.differing else fill}'/>")
        if axis.differing:
            part = _log(axis.differing, most) * width
            out.append(
                f"<rect x='{left}' y='{top}' width='{max(3.0, part):.1f}' height='{row - 6}' rx='3' fill='{fill}'/>"
            )
        out.append(f"</g><text x='{left + max(2.0, length) + 8:.1f}' y='{top + 15}' fill='#5a6775'>{words}</text>")
    out.append("</svg>")
    return "".join(out)


def strip(positions: Sequence[tuple[int, int]], what: str) -> str:
    """An SVG histogram over token positions: how often each position differed, in at most 120 bins."""
    last = max(position for position, _ in positions) + 1
    per = -(-last // _BINS)
    bins = [0] * -(-last // per)
    for position, count in positions:
        bins[position // per] += count
    most, left, width, height = max(bins), 40, 940, 70
    each = min(24.0, width / len(bins))
    out = [_open(1000, height + 34, f"where {what} differ")]
    for index, count in enumerate(bins):
        tall = height * count / most
        x = left + index * each
        begin = index * per
        label = f"position {begin}" if per == 1 else f"positions {begin} to {begin + per - 1}"
        out.append(f"<rect x='{x:.1f}' y='2' width='{max(1.0, each - 1):.1f}' height='{height}' fill='#f3f5f7'/>")
        if count:
            out.append(
                f"<g><title>{label}: {count} times</title><rect x='{x:.1f}' y='{height + 2 - tall:.1f}' "
                f"width='{max(1.0, each - 1):.1f}' height='{tall:.1f}' fill='{_FILL[DIFFERED]}'/></g>"
            )
    end = left + len(bins) * each
    out.append(f"<text x='{left - 6}' y='14' text-anchor='end' fill='#5a6775'>{most}</text>")
    out.append(f"<text x='{left}' y='{height + 20}' fill='#5a6775'>0</text>")
    if len(bins) > 2:
        out.append(f"<text x='{end:.0f}' y='{height + 20}' text-anchor='end' fill='#5a6775'>{last - 1}</text>")
    words = f"how often each {what} differed"
    place = f"x='{end + 12:.0f}' y='14'" if end < 700 else f"x='{left + 60}' y='{height + 20}'"
    out.append(f"<text {place} fill='#5a6775'>{html.escape(words)}</text></svg>")
    return "".join(out)


def _wrong(axis: Axis) -> str:
    parts = [
        f"<h3>{html.escape(axis.name)}</h3>",
        f"<p>{axis.differing:,} of {axis.compared:,} positions in {axis.pairs} pairs; tokens changed at "
        f"{axis.tokens_changed:,}; largest difference of a logprob {axis.largest:.3g}, {axis.ulps:,} steps of "
        "float32.</p>",
    ]
    if axis.generated:
        parts.append(strip(axis.generated, "generated position"))
    if axis.prompt:
        parts.append(strip(axis.prompt, "prompt position"))
    rows = []
    for pair in axis.shown:
        located = f"<br><b>First operation that differs:</b> {html.escape(pair.located)}" if pair.located else ""
        rows.append(
            f"<tr><td><code>{html.escape(pair.first)}</code>{located}</td>"
            f"<td class='n'>{pair.differing:,} of {pair.compared:,}</td><td class='n'>{pair.company}</td></tr>"
        )
    head = "<tr><th>first differing position</th><th class='n'>differ</th><th class='n'>beside</th></tr>"
    return "\n".join([*parts, f"<table>{head}{''.join(rows)}</table>"])


def _table(axes: Sequence[Axis]) -> str:
    head = "".join(
        f"<th{kind}>{name}</th>"
        for name, kind in (
            ("axis", ""),
            ("state", ""),
            ("compared", " class='n'"),
            ("differ", " class='n'"),
            ("rows of logits", " class='n'"),
            ("largest", " class='n'"),
            ("ulps", " class='n'"),
            ("s", " class='n'"),
        )
    )
    rows = []
    for axis in axes:
        reason = f"<br><span class='note'>{html.escape(axis.reason)}</span>" if axis.reason else ""
        numbers = (
            f"{axis.compared:,}",
            f"{axis.differing:,}",
            f"{axis.digests:,}",
            f"{axis.largest:.2g}" if axis.largest else "0",
            f"{axis.ulps:,}",
            f"{axis.seconds:.1f}",
        )
        rows.append(
            f"<tr><td>{html.escape(axis.name)}<br><span class='note'>{html.escape(axis.about)}</span></td>"
            f"<td><span class='state' style='background:{_FILL.get(axis.state, '#e3e6ea')}'>{axis.state}</span>{reason}"
            f"</td>{''.join(f'<td class=n>{n}</td>' for n in numbers)}</tr>"
        )
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _aside(axes: Sequence[Axis]) -> str:
    order = sorted(axes, key=lambda axis: axis.state != NOT_APPLICABLE)
    rows = "".join(
        f"<tr><td>{html.escape(a.name)}</td><td>{a.state}</td><td>{html.escape(a.reason)}</td></tr>" for a in order
    )
    note = " Left out: only another level measures the axis." if any(a.state == LEFT_OUT for a in axes) else ""
    return f"<p class='note'>Not applicable: cannot occur, or the engine refuses it.{note}</p><table>{rows}</table>"


def _facts(report: Report) -> str:
    facts = {
        "system": report.system,
        "mode": report.mode,
        "level": report.level,
        "device": report.device,
        "vLLM": report.vllm,
        "torch": report.torch,
        "when": f"{report.date}, {report.seconds:.0f} s",
        "compared": f"{report.compared:,} positions, {report.differing:,} differ",
        "options": ", ".join(f"{k} {v}" for k, v in (report.options or {}).items() if v not in (None, {}, [], ())),
        "the server says": ", ".join(f"{k} {v}" for k, v in (report.served or {}).items()),
        "bi_patch": report.provenance.words() if report.provenance else "",
        "command": report.provenance.command if report.provenance else "",
    }
    return (
        "<dl>"
        + "".join(f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items() if value)
        + "</dl>"
    )


def _open(width: float, height: float, label: str) -> str:
    return (
        f"<svg viewBox='0 0 {width:.0f} {height:.0f}' xmlns='http://www.w3.org/2000/svg' role='img' "
        f"aria-label='{html.escape(label)}' font-family='system-ui, sans-serif' font-size='13'>"
    )


def _log(value: int, most: int) -> float:
    return log1p(value) / log1p(max(1, most))


def _short(system: str) -> str:
    return system if "://" in system else system.rstrip("/").rsplit("/", 1)[-1]
