"""Draws the demo's picture: one HTML page with inline SVG. The page has no scripts and loads nothing."""

from __future__ import annotations

import html
from collections.abc import Sequence

from bi_patch.tools.demo.level import ABOUT
from bi_patch.tools.demo.run import Side
from bi_patch.tools.demo.show import METHOD, ending, stopped
from bi_patch.tools.demo.texts import Divergence, divergences, pick, words
from bi_patch.tools.verify.case import Case

_SIZE, _GAP, _LEFT, _WIDTH = 24, 4, 200, 1060
_EQUAL, _MISSING = "#bfe6cc", "#e3e6ea"
_NOTE = (
    "Each square is one such comparison. Green: every token and every log probability is bitwise the same. Red: some "
    "differ; the stronger the red, the more positions. A dot: the text itself went another way. Grey: the engine "
    "stopped before this comparison. Point at a square to read which prompt and which batch."
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin-top: 2em; }
p.verdict { font-size: 1.05em; } .note { color: #5a6775; }
table.text { border-collapse: collapse; margin: .6em 0 1.2em; }
table.text th { text-align: left; vertical-align: top; padding: .2em 1em .2em 0; color: #5a6775; font-weight: 500;
                white-space: nowrap; }
mark { background: #ffd9d2; color: #a3200d; font-weight: 600; padding: 0 .15em; border-radius: 3px; }
svg { width: 100%; height: auto; }
"""


def page(title: str, said: Sequence[str], axes: Sequence[str], stock: Side, armed: Side) -> str:
    """The whole page. said: the sentences of the verdict."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p class='verdict'>{html.escape(s)}</p>" for s in said),
        f"<p class='note'>{METHOD} {_NOTE}</p>",
        squares(axes, stock, armed),
    ]
    for side in (stock, armed):
        chosen = pick(divergences(side.cases), 6)
        if chosen:
            parts.append(f"<h2>Texts that changed with the batch in {side.report.mode} vLLM</h2>")
            parts += [_texts(d) for d in chosen]
    parts.append("</body></html>\n")
    return "\n".join(parts)


def squares(axes: Sequence[str], stock: Side, armed: Side) -> str:
    """An SVG: for each axis, a row of squares for stock, and below it a row with the same pairs for armed."""
    out, y = [], 0
    for name in axes:
        count = max(len(stock.of(name)), len(armed.of(name)))
        about = f"<tspan dx='12' font-weight='400' fill='#5a6775'>{html.escape(ABOUT.get(name, ''))}</tspan>"
        out.append(f"<text x='0' y='{y + 15}' font-weight='600'>{html.escape(name)}{about}</text>")
        y += 24
        for side in (stock, armed):
            drawn, height = _row(side, name, count, y, stopped(name, side, stock, armed))
            out.append(drawn)
            y += height
        y += 14
    begin = (
        f"<svg viewBox='0 0 {_WIDTH} {max(y, 1)}' xmlns='http://www.w3.org/2000/svg' role='img' "
        "aria-label='stock and armed, pair by pair' font-family='system-ui, sans-serif' font-size='13'>"
    )
    return "".join([begin, *out, "</svg>"])


def _row(side: Side, name: str, count: int, top: int, cut: bool) -> tuple[str, int]:
    """The squares of one engine along one axis, in as many lines as needed, and the height of these lines."""
    step = _SIZE + _GAP
    across = (_WIDTH - _LEFT) // step
    axis, cases = side.axis(name), side.of(name)
    words_ = f"{axis.differing:,} of {axis.compared:,} differ" if axis.compared else "stopped" if cut else ""
    out = [
        f"<text x='0' y='{top + 17}' fill='#5a6775'>{html.escape(side.report.mode)}</text>",
        f"<text x='{_LEFT - 14}' y='{top + 17}' text-anchor='end' fill='#5a6775'>{words_}</text>",
    ]
    for i in range(count):
        left, y = _LEFT + i % across * step, top + i // across * step
        out.append(_square(left, y, cases[i] if i < len(cases) else None))
    return "".join(out), step * max(1, -(-count // across))


def colour(case: Case | None) -> str:
    """A square's colour: green when no position differs, red by the share that differs, grey without a case."""
    if case is None:
        return _MISSING
    if not case.differs:
        return _EQUAL
    share = min(1.0, case.difference.differing / max(1, case.difference.compared)) ** 0.5
    pale, strong = (255, 214, 204), (222, 78, 52)
    return "#" + "".join(f"{round(p + (s - p) * share):02x}" for p, s in zip(pale, strong))


def _square(left: int, top: int, case: Case | None) -> str:
    box = f"<rect x='{left}' y='{top}' width='{_SIZE}' height='{_SIZE}' rx='3' fill='{colour(case)}'/>"
    if case is None:
        return f"<g>{box}<title>not compared: the engine stopped</title></g>"
    d = case.difference
    hint = f"{case.label}: {d.differing} of {d.compared} positions differ"
    if d.differing:
        hint += f"; {d.first}"
    if d.tokens_changed:
        middle = _SIZE // 2
        box += f"<circle cx='{left + middle}' cy='{top + middle}' r='4' fill='#5b0f00'/>"
    return f"<g>{box}<title>{html.escape(hint)}</title></g>"


def _texts(d: Divergence) -> str:
    rows = "".join(
        f"<tr><th>{label}</th><td>{text}</td></tr>"
        for label, text in (
            ("prompt", html.escape(ending(d.prompt, 20))),
            ("alone", _marked(d.alone, d.word)),
            ("beside others", _marked(d.beside, d.word)),
        )
    )
    return f"<p><b>{html.escape(d.where)}</b></p><table class='text'>{rows}</table>"


def _marked(text: str, index: int) -> str:
    return "".join(
        f"<mark>{html.escape(word)}</mark>" if i == index else html.escape(word) for i, word in enumerate(words(text))
    )
