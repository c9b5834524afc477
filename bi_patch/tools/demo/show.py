"""Shows the demo in a terminal: the table of both engines, the texts that changed, and the verdict."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bi_patch.tools.demo.run import Side
from bi_patch.tools.demo.texts import Divergence, divergences, pick, words
from bi_patch.tools.verify.report import FAILED, Axis

METHOD = (
    "Each prompt is answered alone and then under other conditions: among other requests, with its beginning cached, "
    "in smaller chunks. Both answers are compared bit by bit, position by position."
)
_COLUMNS = (
    "A position differs when its token or a log probability is not bitwise the same. tokens: positions whose token "
    "changed. largest: the largest change of a log probability."
)
# Known failures of stock vLLM in the demo, and their meaning.
_KNOWN = {
    "CPU Generator does not use offset": "on CPU, stock vLLM cannot sample with a seed when it computes the prompt in "
    "several chunks",
}
_CONTEXT = 14  # words shown before the first that differs


def table(axes: Sequence[str], stock: Side, armed: Side) -> RenderableType:
    """One line per axis; stock and armed side by side; fits 80 characters."""
    made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column("\naxis", no_wrap=True)
    for name in ("stock", "armed"):
        made.add_column(f"[bold]{name}[/]\ndiffering", justify="right", no_wrap=True)
        made.add_column("\ntokens", justify="right", no_wrap=True)
        made.add_column("\nlargest", justify="right", no_wrap=True)
    for name in axes:
        made.add_row(name, *(text for side in (stock, armed) for text in _cells(side.axis(name))))
        cut = [side.axis(name).compared > 0 and stopped(name, side, stock, armed) for side in (stock, armed)]
        if any(cut):
            made.add_row("", *(text for is_cut in cut for text in ("[yellow]then stopped[/]" * is_cut, "", "")))
    return Group(made, Text(), Text(_COLUMNS, style="dim"))


def _cells(axis: Axis) -> tuple[str, str, str]:
    if not axis.compared:
        return f"[yellow]{'stopped' if axis.state == FAILED else axis.state}[/]", "", ""
    colour = "red" if axis.differing else "green"
    tokens = f"[bold red]{axis.tokens_changed}[/]" if axis.tokens_changed else "[green]0[/]"
    largest = f"[red]{axis.largest:.1e}[/]" if axis.largest else f"[{colour}]0[/]"
    return f"[{colour}]{axis.differing} of {axis.compared}[/]", tokens, largest


def stopped(name: str, side: Side, stock: Side, armed: Side) -> bool:
    """Whether this side compared fewer pairs along the axis than the other side."""
    return side.axis(name).pairs < max(stock.axis(name).pairs, armed.axis(name).pairs)


def texts(side: Side, limit: int = 4) -> RenderableType | None:
    """Both continuations of at most `limit` texts that changed, with the first differing word marked.

    None when no text changed.
    """
    chosen = pick(divergences(side.cases), limit)
    if not chosen:
        return None
    title = Text(f"\nTexts that changed with the batch in {side.report.mode} vLLM:", style="bold")
    return Group(title, *(_block(divergence) for divergence in chosen))


def _block(d: Divergence) -> Text:
    """Four lines without a box, which stay readable in a file."""
    body = Text()
    body.append(f"\n{d.where}\n", style="bold")
    body.append(f"  prompt:  {ending(d.prompt)}\n", style="dim")
    for label, text in (("  alone:   ", d.alone), ("  beside:  ", d.beside)):
        body.append(label, style="bold")
        body.append_text(_marked(text, d.word))
        body.append("\n")
    body.rstrip()
    return body


def ending(text: str, count: int = 9) -> str:
    """The last words of a prompt."""
    parts = text.split()
    return ("… " if len(parts) > count else "") + " ".join(parts[-count:])


def _marked(text: str, index: int) -> Text:
    parts = words(text)
    start = max(0, index - _CONTEXT)
    made = Text("…" if start else "")
    for i, word in enumerate(parts[start : index + _CONTEXT], start=start):
        made.append(" ".join(word.split("\n")), style="bold red underline" if i == index else "")
    if index >= len(parts):
        made.append(" (ends here)", style="bold red")
    return made


def verdict(axes: Sequence[str], stock: Side, armed: Side) -> list[str]:
    """The sentences of both reports. What stopped the stock engine is said in short, for the demo goes on."""
    said = [stock.report.verdict[0]]
    if stock.report.stopped:
        said.append(f"It stopped early: {_short(stock.report.stopped)}.")
    else:
        said += [
            f"It stopped early at {name}: {_short(stock.axis(name).reason)}."
            for name in axes
            if stopped(name, stock, stock, armed)
        ]
    said += armed.report.verdict
    if armed.report.differing and not armed.report.open_seams:
        said.append("No patch point is open, so this is a defect of bi_patch: please report it with this run's JSON.")
    return said


def _short(reason: str) -> str:
    """An engine's failure without the class of the error around it and without the place of its log."""
    text = re.sub(r"^EngineFailed: |\W*its output is in \S+", "", reason).rstrip(". ")
    return text + "".join(f" ({meaning})" for words_, meaning in _KNOWN.items() if words_ in text)
