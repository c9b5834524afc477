"""`bi-patch status`: every seam of the installed vLLM, closed, open with its reason, or not needed here."""

import sys

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bi_patch.tools.cli import app


@app.command()
def status(
    json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Arm the installed vLLM, load the modules that hold seams, and list each. Exit 1 when a required one is open."""
    from bi_patch import arming
    from bi_patch.arming import startup
    from bi_patch.errors import UnsupportedRelease
    from bi_patch.tools.findings import everything

    state = arming.arm()
    if state is None or state.plan is None or state.installed is None:
        raise UnsupportedRelease("nothing to show: no vLLM is installed in this environment, or BI_PATCH=0 is set")
    findings = everything()
    is_open = [f for f in findings if f.status == startup.OPEN and f.required]
    if json:
        report = {
            "vllm": str(state.plan.release),
            "distribution": state.installed.distribution,
            "platform": state.plan.platform,
            "required_open": [f.name for f in is_open],
            "seams": findings,
        }
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    else:
        _table(state, findings, is_open)
    raise typer.Exit(1 if is_open else 0)


def _table(state, findings, is_open) -> None:
    console = Console()
    table = Table(title=f"vLLM {state.plan.release} on {state.plan.platform}", title_justify="left")
    table.add_column("seam", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("what takes its place, or why it is open; where it is", overflow="fold")
    colour = {"closed": "green", "open": "bold red", "not needed here": "dim"}
    for f in findings:
        what = f"{escape(f.reason or f.how)}\n[dim]{escape(f.target.replace(':', ' : '))}[/]"
        table.add_row(f.name, f"[{colour[f.status]}]{f.status}[/]", what)
    console.print(table)
    closed = sum(f.status == "closed" for f in findings)
    console.print(f"{closed} closed, {len(is_open)} required and open")
