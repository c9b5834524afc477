"""`bi-patch certify`: the certificates on this machine: which problems, which rows, which route."""

import sys

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bi_patch import settings
from bi_patch.tools.cli import app


@app.command()
def certify(
    json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """List the certificates that armed engines have made here. Exit 1 when a file is corrupt or a row order failed.

    An armed engine makes missing certificates while it loads a model, and makes them again when a library, the CPU,
    the number of threads or a bundled kernel changes.
    """
    from bi_patch.ops import certificates

    folder = settings.read().cache
    listed = certificates.every(folder)
    corrupt = [file.name for file, certificate in listed if certificate is None]
    good = [certificate for _, certificate in listed if certificate is not None]
    if json:
        report = {"folder": str(folder / "certificates"), "certificates": good, "corrupt": corrupt}
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    else:
        _table(folder, good, corrupt)
    # A library that fails is served by the bundled kernel; a kept kernel that fails has no such way out.
    failed = [c for c in good if not c.passed and c.route == "kept"]
    raise typer.Exit(1 if corrupt or failed else 0)


def _table(folder, good, corrupt) -> None:
    console = Console()
    if not good and not corrupt:
        text = f"No certificates in {folder / 'certificates'} yet: an armed engine makes them as it loads."
        console.print(text, markup=False)
        return
    table = Table(title=f"Certificates in {escape(str(folder / 'certificates'))}", title_justify="left")
    columns = ("operation", "problem", "rows compared", "elements", "differing", "library equal to bundled", "made")
    for column in columns:
        table.add_column(column, overflow="fold")
    for c in sorted(good, key=lambda c: (c.key.operation, c.key.problem)):
        some = f"[yellow]{len(c.passed_rows)} of {len(c.evidence.rows)} rows[/]"
        verdict = "[green]all rows[/]" if c.passed else some
        if c.route == "kept":
            verdict = "[green]rows equal alone and among others[/]" if c.passed else "[bold red]failed[/]"
        rows = c.evidence.rows
        table.add_row(
            escape(c.key.operation),
            escape(c.key.problem),
            f"{len(rows)} (M {rows[0]}..{rows[-1]})",
            f"{c.evidence.compared:,}",
            f"{c.evidence.differing:,}",
            verdict,
            f"{c.made}, {c.seconds:.2f} s",
        )
    console.print(table)
    devices = sorted({f"{c.key.device}; {c.key.libraries}" for c in good})
    console.print("Valid for: " + " | ".join(devices), markup=False)
    for name in corrupt:
        console.print(f"[bold red]corrupt, not believed and made again at the next start:[/] {escape(name)}")
