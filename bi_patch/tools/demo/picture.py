"""The demo's picture: one HTML page with inline SVG, no scripts and nothing to load."""

from __future__ import annotations

import html

from bi_patch.tools.demo.show import pick
from bi_patch.tools.demo.verdict import Cell, Divergence, Side, words

_CELL_W, _CELL_H, _LEFT, _TOP = 104, 46, 110, 58
_NOTE = (
    "Each square is one prompt in one kind of batch, compared bitwise with the same prompt alone. Number: positions "
    "whose token or logprobs changed, of those compared; below it the largest logprob difference."
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin-top: 2em; }
p.verdict { font-size: 1.05em; } .note { color: #5a6775; }
table.text { border-collapse: collapse; margin: .6em 0 1.2em; }
table.text th { text-align: left; vertical-align: top; padding: .2em 1em .2em 0; color: #5a6775; font-weight: 500; }
mark { background: #ffd9d2; color: #a3200d; font-weight: 600; padding: 0 .15em; border-radius: 3px; }
svg { width: 100%; height: auto; }
"""


def page(
    title: str, said: list[str], names: tuple[str, ...], columns: tuple[str, ...], stock: Side, armed: Side
) -> str:
    """The whole page. said: the verdict's sentences."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p class='verdict'>{html.escape(s)}</p>" for s in said),
        f"<p class='note'>{_NOTE}</p>",
    ]
    for side in (stock, armed):
        parts += [f"<h2>{side.mode.capitalize()} vLLM</h2>", heat_map(names, columns, side)]
    chosen = pick(stock.divergences, 6)
    if chosen:
        parts.append("<h2>Texts that changed in stock vLLM</h2>")
        parts += [_texts(d) for d in chosen]
    if armed.divergences:
        parts.append("<h2>Texts that changed in armed vLLM</h2>")
        parts += [_texts(d) for d in pick(armed.divergences, 6)]
    parts.append("</body></html>\n")
    return "\n".join(parts)


def heat_map(names: tuple[str, ...], columns: tuple[str, ...], side: Side) -> str:
    """An SVG grid: prompts down, batches across; white is bitwise equal, red is many changed positions."""
    width = _LEFT + _CELL_W * len(columns) + 4
    height = _TOP + _CELL_H * len(names) + 4
    begin = (
        f"<svg viewBox='0 0 {width} {height}' xmlns='http://www.w3.org/2000/svg' role='img' "
        f"aria-label='{html.escape(side.mode)} differences' font-family='system-ui, sans-serif' font-size='13'>"
    )
    out = [begin]
    for x, column in enumerate(columns):
        middle = _LEFT + x * _CELL_W + _CELL_W / 2
        place = f"x='{middle}' y='{_TOP - 12}' text-anchor='middle'"
        out.append(f"<text {place} fill='#5a6775'>{html.escape(column)}</text>")
    for y, name in enumerate(names):
        top = _TOP + y * _CELL_H
        out.append(f"<text x='{_LEFT - 10}' y='{top + _CELL_H / 2 + 5}' text-anchor='end'>{html.escape(name)}</text>")
        for x, column in enumerate(columns):
            cell = next((c for c in side.cells if (c.prompt, c.batch) == (name, column)), None)
            out.append(_square(_LEFT + x * _CELL_W, top, cell))
    out.append("</svg>")
    return "".join(out)


def colour(cell: Cell) -> str:
    """Green tint for no difference, from pale to strong red with the share of changed positions, grey if stopped."""
    if cell.stopped and not cell.compared:
        return "#e3e6ea"
    if not cell.differing:
        return "#e2f4e8"
    share = min(1.0, cell.differing / max(1, cell.compared)) ** 0.5
    pale, strong = (255, 225, 218), (236, 112, 88)
    return "#" + "".join(f"{round(p + (s - p) * share):02x}" for p, s in zip(pale, strong))


def _square(left: float, top: float, cell: Cell | None) -> str:
    if cell is None:
        return ""
    fill = colour(cell)
    middle = left + _CELL_W / 2
    box = f"<rect x='{left + 2}' y='{top + 2}' width='{_CELL_W - 4}' height='{_CELL_H - 4}' rx='5' fill='{fill}'/>"
    if cell.stopped and not cell.compared:
        return box + f"<text x='{middle}' y='{top + 28}' text-anchor='middle' fill='#5a6775'>stopped</text>"
    lines = f"{cell.differing} / {cell.compared}"
    below = f"{cell.largest:.1e}" if cell.largest else ("tokens" if cell.tokens_changed else "same")
    hint = html.escape(cell.first or "bitwise the same")
    return (
        f"<g>{box}<title>{hint}</title><text x='{middle}' y='{top + 20}' text-anchor='middle'>{lines}</text>"
        f"<text x='{middle}' y='{top + 36}' text-anchor='middle' font-size='11' fill='#33404d'>{below}</text></g>"
    )


def _texts(d: Divergence) -> str:
    rows = "".join(
        f"<tr><th>{label}</th><td>{_marked(text, d.word)}</td></tr>"
        for label, text in (("alone", d.alone), ("beside others", d.beside))
    )
    return f"<p><b>{html.escape(d.prompt)}</b>, {html.escape(d.batch)}</p><table class='text'>{rows}</table>"


def _marked(text: str, index: int) -> str:
    return "".join(
        f"<mark>{html.escape(word)}</mark>" if i == index else html.escape(word) for i, word in enumerate(words(text))
    )
