"""Fixtures that run the command line: in a real process, and in a terminal of 80 columns."""

import io
import subprocess

import pytest
from rich.console import Console

COMMAND = "import sys, bi_patch_entry; sys.argv = ['bi-patch', *{arguments!r}]; bi_patch_entry.cli()"
FRAMES = frozenset(map(chr, range(0x2500, 0x2580)))  # box-drawing characters


@pytest.fixture
def bi_patch(run_python):
    """bi_patch(*arguments, **environ) returns the finished process, whose output goes into pipes."""

    def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
        done = run_python(COMMAND.format(arguments=arguments), **{"COLUMNS": "80"} | environ)
        assert not FRAMES & set(done.stdout + done.stderr), done.stdout
        return done

    return run


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80 columns for commands in this process. terminal() returns the lines that it shows."""
    from bi_patch.tools import output

    shown = io.StringIO()
    made = Console(file=shown, force_terminal=True, width=80, no_color=True, highlight=False)
    monkeypatch.setattr(output, "console", lambda **_: made)

    def lines() -> list[str]:
        from rich.text import Text

        return Text.from_ansi(shown.getvalue()).plain.splitlines()

    return lines
