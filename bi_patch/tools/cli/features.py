"""`bi-patch features` prints what is served, refused or untried, and renews or checks the tables of pages."""

from pathlib import Path
from typing import Annotated

import typer

from bi_patch.tools.cli import app


@app.command()
def features(
    pages: Annotated[list[Path] | None, typer.Argument(help="Markdown pages with marks, e.g. README.md.")] = None,
    about: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Print what names this text, e.g. `LoRA`, with reasons and advice; repeatable for all of several.",
        ),
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Renew the tables between the marks of the pages.")] = False,
) -> None:
    """Print what is served, refused and untried.

    Without PAGES, the command prints a line for each feature and model. With PAGES, it checks that the pages' tables
    match the code, or renews the tables with --write.

    Exit code 1: a table does not match the code.
    """
    from bi_patch.errors import SettingError
    from bi_patch.tools import marks, output
    from bi_patch.tools.features import blocks, found, states

    if about and (pages or write):
        raise SettingError("--about prints and takes no pages")
    if about:
        rows = found(about)
        if not rows:
            texts = " and ".join(map(repr, about))
            alone = all(map(found, ([text] for text in about)))
            wider = "Rows name each of them, and a row of both may name a wider group, e.g. 'quantized weights' for AWQ"
            advice = wider if len(about) > 1 and alone else "`bi-patch features` prints all of it"
            raise SettingError(f"no row of the feature table names {texts}. {advice}")
        output.paragraph(output.console(), "\n\n".join(rows))
        return
    made = blocks()
    if not pages:
        if write:
            raise SettingError("--write needs pages: bi-patch features --write README.md docs/coverage.md")
        output.rows(output.console(), states())
        output.paragraph(output.console(), "\n`bi-patch features --about TEXT` tells why, and what to do instead.")
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
