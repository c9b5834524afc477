"""Commands fit their output to a terminal; in a pipe they print plain text, one whole line for each item."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from bi_patch.tools import output

LONG = "many words " * 30 + "end"
ITEMS = [("a", Text("closed", style="red"), LONG), ("a.longer", "open", "[red]x[/bold]\nsecond line :smile:")]


def printed(how, *, terminal):
    """The lines that `how(console)` prints to a console; a terminal is 80 columns wide."""
    held = io.StringIO()
    width = 80 if terminal else output.console().width
    how(Console(file=held, force_terminal=terminal, width=width, no_color=True))
    return Text.from_ansi(held.getvalue()).plain.splitlines()


def test_rows_are_whole_lines_in_a_pipe_and_cut_ones_in_a_terminal():
    lines = printed(lambda to: output.rows(to, ITEMS), terminal=False)
    assert lines == [f"a         closed  {LONG}", "a.longer  open    [red]x[/bold] second line :smile:"]
    lines = printed(lambda to: output.rows(to, ITEMS), terminal=True)
    assert [len(line) <= 80 for line in lines] == [True, True] and lines[0].endswith("…")
    assert printed(lambda to: output.rows(to, []), terminal=True) == []


def test_a_paragraph_is_wrapped_in_a_terminal_only():
    assert printed(lambda to: output.paragraph(to, LONG), terminal=False) == [LONG]
    lines = printed(lambda to: output.paragraph(to, LONG), terminal=True)
    assert len(lines) > 1 and all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("terminal", [True, False])
def test_an_item_is_never_cut_or_taken_for_markup(terminal):
    text = f"/a/path/[red]b[/bold] {LONG}"
    assert printed(lambda to: output.whole(to, text), terminal=terminal) == [text]


def test_a_table_has_a_frame_in_a_terminal_only():
    def show(to):
        made = output.table(to, "A title")
        made.add_column("name")
        made.add_column("text")
        made.add_row("a", LONG)
        to.print(made)

    frame = set(map(chr, range(0x2500, 0x2580)))
    lines = printed(show, terminal=False)
    assert [line.strip() for line in lines] == ["A title", f"name  {'text'}", f"a     {LONG}"]
    assert frame & set("".join(printed(show, terminal=True)))
