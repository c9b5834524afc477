"""`bi-patch certify` shows this machine's certificates: for each operation and problem, which kernel serves."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.text import Text

from bi_patch import settings
from bi_patch.tools import output
from bi_patch.tools.cli import app

if TYPE_CHECKING:
    from bi_patch.ops.certificates import Certificate

CERTIFIED, PARTLY, REPLACED, FAILED = "certified", "certified in part", "replaced", "failed"
_COLOURS = {CERTIFIED: "green", PARTLY: "yellow", REPLACED: "yellow", FAILED: "bold red"}


@app.command()
def certify(
    every: Annotated[bool, typer.Option("--all", help="List every certificate.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show the certificates on this machine.

    A certificate records how a library kernel was compared bitwise over numbers of rows. An armed engine makes the
    missing certificates while it loads a model. It makes them again when a library, the device, the number of threads
    or a bundled kernel changes.

    Exit code 0: all is well. 1: a file is corrupt, or a kernel that nothing can replace failed.
    """
    from bi_patch.ops import certificates

    folder = settings.read().cache
    listed = certificates.every(folder)
    corrupt = [file for file, certificate in listed if certificate is None]
    good = [certificate for _, certificate in listed if certificate is not None]
    if json:
        report = {
            "folder": str(folder / "certificates"),
            "certificates": good,
            "corrupt": [file.name for file in corrupt],
        }
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    else:
        _print(folder / "certificates", sorted(good, key=lambda c: (c.key.operation, c.key.problem)), corrupt, every)
    raise typer.Exit(1 if corrupt or any(state(c) == FAILED for c in good) else 0)


def state(certificate: "Certificate") -> str:
    """What a certificate says about its library kernel.

    CERTIFIED: the library kernel serves every number of rows. PARTLY: it serves only numbers of rows, or algorithms,
    whose bits were equal. REPLACED: a kernel with a fixed order serves instead. FAILED: no kernel can replace the
    library kernel, so the engine stops.
    """
    if certificate.passed:
        return CERTIFIED
    if certificate.route == "kept":
        return FAILED
    return PARTLY if certificate.passed_rows or certificate.algorithms else REPLACED


def _print(folder: Path, good: "list[Certificate]", corrupt: list[Path], every: bool) -> None:
    console = output.console()
    if not good and not corrupt:
        output.whole(console, f"No certificates in {folder}: an armed engine makes them while it loads a model.")
        return
    states = [state(c) for c in good]
    failed, operations = states.count(FAILED), len({c.key.operation for c in good})
    partly = states.count(PARTLY)
    summary = (
        f"{_number(len(good), 'certificate')} for {_number(operations, 'operation')} on this machine: "
        f"{_number(states.count(CERTIFIED) + partly, 'kernel')} certified"
        + (f" ({partly} of them for some numbers of rows only)" if partly else "")
        + f", {states.count(REPLACED)} replaced by a fixed-order kernel, {failed} failed"
        + (f"; {_number(len(corrupt), 'corrupt file')}" if corrupt else "")
        + "."
    )
    output.paragraph(console, Text(summary, style="bold red" if failed or corrupt else "green"))
    output.whole(console, f"Folder: {folder}")
    more = "" if every else " `bi-patch certify --all` lists every certificate."
    output.paragraph(console, _EXPLAINED + more)
    for c in good:
        if state(c) == FAILED:
            what = f"  {c.key.operation}  {c.key.problem}: {c.evidence.first}; an engine that needs it stops with "
            output.whole(console, Text.assemble((FAILED, _COLOURS[FAILED]), what, "CertificateFailed"))
    for file in corrupt:
        what = f"  {file}: not used; an engine that needs this certificate makes it again"
        output.whole(console, Text.assemble(("corrupt", "bold red"), what))
    if every and good:
        output.paragraph(console, "")
        output.rows(console, map(_row, good))
        for made_for in sorted({f"{c.key.device}; {c.key.libraries}" for c in good}):
            output.whole(console, f"Made for: {made_for}")


_EXPLAINED = (
    "A certificate records whether a fast kernel gives a row the same bits for every number of rows. Where the kernel "
    "does not, a kernel with a fixed order of sums replaces it. Where no such kernel exists, the engine stops."
)


def _row(c: "Certificate") -> tuple[str | Text, ...]:
    certified = state(c)
    compared = f"{len(c.passed_rows)} of {len(c.evidence.rows)} numbers of rows equal, {c.evidence.differing:,} of "
    compared += f"{c.evidence.compared:,} elements differ, kernel {c.route}, made {c.made} in {c.seconds:.2f} s"
    compared += _serves(c)
    return Text(certified, style=_COLOURS[certified]), c.key.operation, c.key.problem, compared


def _serves(c: "Certificate") -> str:
    """Of a CPU linear: for which numbers of rows the library serves, and the bundled kernels that serve the rest."""
    from bi_patch.ops.cpu import linear

    if c.key.operation != linear.OPERATION:
        return ""
    rows = linear.serving(c)
    library = f"M = {', '.join(map(str, sorted(rows)))}" if rows else "no number of rows"
    return f"; the library serves {library}, {c.key.kernels} the rest"


def _number(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
