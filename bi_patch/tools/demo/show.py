"""The demo's table and texts for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bi_patch.tools.demo.verdict import Cell, Divergence, Side, words

_CONTEXT = 14  # words shown before the first that differs


def table(names: tuple[str, ...], columns: tuple[str, ...], stock: Side, armed: Side) -> Table:
    """One line per prompt and batch; stock and armed side by side; fits 80 characters."""
    made = Table(
        title="The same prompt, alone against beside others: positions that changed",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    made.add_column("\nprompt", no_wrap=True)
    made.add_column("\nbatch", no_wrap=True)
    made.add_column("\ncompared", justify="right", no_wrap=True)
    for side in (stock, armed):
        made.add_column(f"[bold]{side.mode}[/]\ntokens", justify="right", no_wrap=True)
        made.add_column("\nlogprobs", justify="right", no_wrap=True)
        made.add_column("\nlargest", justify="right", no_wrap=True)
    for name in names:
        shown = name
        for column in columns:
            cells = [_find(side, name, column) for side in (stock, armed)]
            if not any(cells):
                continue
            compared = max(cell.compared for cell in cells if cell)
            made.add_row(shown, column, str(compared), *(text for cell in cells for text in _texts(cell)))
            shown = ""
        made.add_row()
    return made


def _find(side: Side, name: str, column: str) -> Cell | None:
    return next((c for c in side.cells if (c.prompt, c.batch) == (name, column)), None)


def _texts(cell: Cell | None) -> tuple[str, str, str]:
    if cell is None:
        return "", "", ""
    if cell.stopped and not cell.compared:
        return "[yellow]stopped[/]", "", ""
    colour = "red" if cell.differing else "green"
    tokens = f"[bold red]{cell.tokens_changed}[/]" if cell.tokens_changed else "[green]0[/]"
    largest = f"[red]{cell.largest:.1e}[/]" if cell.largest else f"[{colour}]0[/]"
    return tokens, f"[{colour}]{cell.differing}[/]", largest


def divergences(side: Side, limit: int = 4) -> RenderableType | None:
    """Both continuations of the clearest texts that changed, the first differing word marked; None when none did."""
    chosen = pick(side.divergences, limit)
    if not chosen:
        return None
    panels = []
    for d in chosen:
        body = Text()
        for label, text in (("alone:  ", d.alone), ("beside: ", d.beside)):
            body.append(label, style="bold")
            body.append_text(_marked(text, d.word))
            body.append("\n")
        body.rstrip()
        panels.append(Panel(body, title=f"{d.prompt}, {d.batch}", title_align="left"))
    return Group(Text(f"Where {side.mode} vLLM's text really changed:", style="bold"), *panels)


def pick(found: list[Divergence], limit: int) -> list[Divergence]:
    """At most `limit`: the earliest change of each prompt first, then others, each pair of texts once."""
    once = list({(d.prompt, d.alone, d.beside): d for d in reversed(found)}.values())
    once.sort(key=lambda d: d.word)
    first = {d.prompt: d for d in reversed(once)}
    rest = [d for d in once if d is not first[d.prompt]]
    return [*sorted(first.values(), key=lambda d: d.word), *rest][:limit]


def _marked(text: str, index: int) -> Text:
    parts = words(text)
    start = max(0, index - _CONTEXT)
    made = Text("…" if start else "")
    for i, word in enumerate(parts[start : index + _CONTEXT], start=start):
        made.append(" ".join(word.split("\n")), style="bold red underline" if i == index else "")
    if index >= len(parts):
        made.append(" (ends here)", style="bold red")
    return made
