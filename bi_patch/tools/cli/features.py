"""`bi-patch features` prints tables of what is served, refused or untried, and renews or checks them in pages."""

from pathlib import Path
from typing import Annotated

import typer

from bi_patch.tools.cli import app


@app.command()
def features(
    pages: Annotated[list[Path] | None, typer.Argument(help="Markdown pages with marks, e.g. README.md.")] = None,
    about: Annotated[
        str,
        typer.Option(metavar="TEXT", help="Print only what names this text, e.g. `LoRA` or `Qwen3`, as plain text."),
    ] = "",
    write: Annotated[bool, typer.Option("--write", help="Renew the tables between the marks of the pages.")] = False,
) -> None:
    """Print what is served, refused and untried.

    With PAGES, the command checks that the pages' tables match the code, or renews the tables with --write.

    Exit code 1: a table does not match the code.
    """
    from bi_patch.errors import SettingError
    from bi_patch.tools import marks, output
    from bi_patch.tools.features import blocks, found

    if about and (pages or write):
        raise SettingError("--about prints and takes no pages")
    if about:
        rows = found(about)
        if not rows:
            raise SettingError(f"nothing in the feature table names {about!r}. `bi-patch features` prints all of it")
        output.paragraph(output.console(), "\n\n".join(rows))
        return
    made = blocks()
    if not pages:
        if write:
            raise SettingError("--write needs pages: bi-patch features --write README.md docs/coverage.md")
        print("\n\n".join(table for name, table in made.items() if name != "support"))
        return
    old = {}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if not marks.held(text, made):
            raise marks.MarksMissing(f"{page} has no marks of a table; the marks are {', '.join(made)}")
        if write:
            page.write_text(marks.renew(text, made), encoding="utf-8")
        elif names := marks.stale(text, made):
            old[page] = names
    for page, names in old.items():
        print(f"{page}: {', '.join(names)} differ from the code. Run: bi-patch features --write {page}")
    raise typer.Exit(1 if old else 0)
