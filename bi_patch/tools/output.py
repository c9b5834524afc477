"""How commands print. A terminal gets tables fitted to its width; a pipe gets plain text, one whole line per item."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNBOUNDED = 100_000  # columns: outside a terminal, rich must neither wrap nor cut
_GAP = "  "


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal. Without a terminal, the console never wraps or cuts a line."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=_UNBOUNDED)


def table(to: Console, title: str) -> Table:
    """An empty table: framed in a terminal, rows of plain text elsewhere."""
    made = Table(title=title, title_justify="left")
    if not to.is_terminal:
        made.box, made.pad_edge, made.padding = None, False, (0, 2, 0, 0)
    return made


def paragraph(to: Console, text: str | Text) -> None:
    """Print a paragraph: wrapped at words in a terminal, one line elsewhere. `text` is not read as markup."""
    to.print(text, markup=False, highlight=False, emoji=False)


def whole(to: Console, text: str | Text) -> None:
    """Print one item that a reader may copy, such as a path or a reason. The item is never cut or wrapped."""
    to.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def rows(to: Console, items: Iterable[Sequence[str | Text]]) -> None:
    """Print one line per item, in aligned columns. In a terminal, a line is cut at the terminal's width.

    Line ends inside a cell of plain text become spaces.
    """
    cells = [[_one_line(cell) for cell in item] for item in items]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        line = Text(_GAP).join(_padded(cell, width) for cell, width in zip(row, widths))
        line.rstrip()
        if to.is_terminal:
            line.truncate(to.width, overflow="ellipsis")
        whole(to, line)


def _one_line(cell: str | Text) -> Text:
    if isinstance(cell, Text):
        return cell
    return Text(" ".join(cell.split()))


def _padded(cell: Text, width: int) -> Text:
    made = cell.copy()
    made.pad_right(width - len(cell))
    return made
