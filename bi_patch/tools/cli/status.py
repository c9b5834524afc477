"""`bi-patch status` shows what arming does here: which patch points are closed, open (and why), or not needed."""

import dataclasses
import difflib
import functools
import re
import sys
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.text import Text

from bi_patch.errors import AnchorMoved, SettingError, UnsupportedRelease
from bi_patch.tools import output
from bi_patch.tools.cli import app

if TYPE_CHECKING:
    from bi_patch.arming import State
    from bi_patch.arming.startup import Finding
    from bi_patch.seams.model import Seam, Variable

_COLOURS = {"closed": "green", "open": "bold red", "not needed here": "dim"}
_VARIABLE = "environment:"
_LINK = re.compile(r"https?://[^\s)>,]+")


@dataclasses.dataclass(frozen=True)
class Look:
    """What arming did in this process. moved: upstream's change where vLLM's source is not the recorded one, or ""."""

    state: "State"
    findings: "list[Finding]"
    moved: str

    @property
    def required_open(self) -> "list[Finding]":
        return [f for f in self.findings if f.status == "open" and f.required]

    @property
    def ok(self) -> bool:
        return not self.required_open and not self.moved


@app.command()
def status(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            help="Explain this patch point. With another text, e.g. RMSNorm: list those that change it.",
        ),
    ] = "",
    every: Annotated[bool, typer.Option("--all", help="List every patch point of this platform.")] = False,
    every_platform: Annotated[
        bool, typer.Option("--every-platform", help="With --all: list the patch points of other platforms, too.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show what arming does in this environment.

    A patch point is one place in vLLM that bi_patch replaces. The command arms its own process, loads the modules of
    vLLM that hold patch points, and says which are closed and which are open. It does not look at running servers.

    Exit code 0: an engine would start armed. 1: a required patch point is open, or vLLM's source is not that of the
    release. 2: arming is not possible here.
    """
    if every_platform and not every:
        raise SettingError("--every-platform needs --all")
    if bool(name) + every + json > 1:
        raise SettingError("NAME, --all and --json: choose one")
    names = _named(name) if name else []
    look = _look()
    if json:
        _json(look)
    elif names == [name]:
        _one(look, name)
    elif names:
        _those(look, names)
    else:
        _summary(look)
        _every(look, every_platform) if every else _open(look)
    raise typer.Exit(0 if look.ok else 1)


def _look() -> Look:
    """Arm this process. Raises the named error that keeps it from being armed."""
    from bi_patch import arming, settings
    from bi_patch.seams import anchors
    from bi_patch.tools import findings

    if not settings.read().enabled:
        raise SettingError("BI_PATCH=0 is set, so bi_patch arms nothing here. Unset it to see what arming would do")
    state = arming.arm()
    if state is None:
        raise UnsupportedRelease("nothing to show: no vLLM is installed in this environment")
    found, moved = findings.everything(), ""
    try:
        anchors.check_installed(state.plan, state.installed.folder.parent, state.settings.cache)
    except AnchorMoved as error:
        moved = str(error)
    return Look(state, found, moved)


def _named(name: str) -> list[str]:
    """The patch point of this name, or those with this text in the name or in what they change. Raises SettingError."""
    from bi_patch.tools import findings

    declared = findings.declared()
    known = list(declared)
    if name in known:
        return [name]
    if changing := [n for n, one in declared.items() if name.lower() in f"{n} {_where(one)}".lower()]:
        return changing
    close = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    raise SettingError(
        f"no patch point is called {name!r}.{hint} `bi-patch status --all --every-platform` lists every name"
    )


def _where(declared: "Seam | Variable") -> str:
    """What a patch point replaces, in every release, or the name of a variable."""
    return getattr(declared, "variable", "") or " ".join(map(str, declared.targets))


def _json(look: Look) -> None:
    from bi_patch import __version__

    report = {
        "version": __version__,
        "vllm": str(look.state.plan.release),
        "distribution": look.state.installed.distribution,
        "platform": look.state.plan.platform,
        "required_open": [f.name for f in look.required_open],
        "allowed_code": sorted(look.state.settings.allow_code),
        "moved": look.moved,
        "seams": look.findings,
    }
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


def _summary(look: Look) -> None:
    console = output.console()
    points = [f for f in look.findings if not _is_variable(f)]
    is_open = [f for f in look.findings if f.status == "open"]
    optional = [f for f in is_open if not f.required]
    allowed = not look.moved and look.state.settings.allow_open
    would = "would be armed" if look.ok else "would start without batch invariance" if allowed else "would not start"
    counted = f"{sum(f.status == 'closed' for f in points)} patch points closed, {len(look.required_open)} open"
    counted += f", {len(optional)} optional and open" if optional else ""
    output.paragraph(
        console,
        "This command arms its own process to see what arming would do here. It says nothing about a running server: "
        "an armed server logs a line that begins with `bi_patch VERSION armed`, and its /version has the field "
        "`bi_patch`. A server without them is not armed. `bi-patch verify --url URL` reads the field and measures.",
    )
    summary = f"In this environment vLLM {look.state.plan.release} on {look.state.plan.platform} {would}: {counted}."
    output.paragraph(console, Text(summary, style="green" if look.ok else "bold red"))
    if look.required_open and allowed:
        output.paragraph(console, "BI_PATCH_ALLOW_OPEN=1 lets an engine start with open patch points.")
    elif not look.ok:
        error = "SeamOpen" if look.required_open else "AnchorMoved"
        output.paragraph(console, f"An engine stops with {error} before it serves a request.")
    output.paragraph(
        console,
        "A patch point is one place in vLLM that bi_patch replaces. `bi-patch status --all` lists every patch point; "
        "`bi-patch status NAME` explains a single one.",
    )
    output.paragraph(console, _covered(look))
    if look.state.settings.allow_code:
        names = ", ".join(sorted(look.state.settings.allow_code))
        output.paragraph(console, f"You vouch for code that bi_patch does not cover (BI_PATCH_ALLOW_CODE): {names}.")
    if look.moved:
        output.whole(console, Text(f"\nAnchorMoved: {look.moved}", style="red"))


def _covered(look: Look) -> str:
    """What the feature table says of this release and platform."""
    from bi_patch.platforms.features.engine import FEATURES
    from bi_patch.platforms.features.model import REFUSED
    from bi_patch.platforms.features.pairs import PAIRS
    from bi_patch.platforms.features.versions import VERSIONS

    release, platform = look.state.plan.release, look.state.plan.platform
    refused = [row.name for row in (*FEATURES, *PAIRS) if row.cell(platform, release).state == REFUSED]
    state = VERSIONS[platform][str(release)].state
    return (
        f"The feature table counts vLLM {release} on {platform} as {state}. An engine refuses {len(refused)} features "
        "by name there. `bi-patch features` lists what is served, refused and untried; `--about TEXT` looks one up."
    )


def _open(look: Look) -> None:
    console = output.console()
    is_open = [f for f in look.findings if f.status == "open"]
    if is_open:
        output.paragraph(console, "")
    for f in is_open:
        what = "open" if f.required else "open (optional)"
        output.whole(console, Text.assemble((what, _COLOURS["open"]), f"  {f.name}  {' '.join(f.reason.split())}"))


def _those(look: Look, names: list[str]) -> None:
    """A line for each of these patch points: its state, and what it replaces."""
    from bi_patch.tools import findings

    declared, held = findings.declared(), {f.name: (f.status, f.target) for f in look.findings}
    lines = []
    for name in names:
        # A variable of another platform has no finding.
        state, target = held.get(name) or (findings.NOT_NEEDED, f"{_VARIABLE}{_where(declared[name])}")
        lines.append((name, Text(state, _COLOURS[state]), target))
    output.rows(output.console(), lines)


def _every(look: Look, every_platform: bool) -> None:
    from bi_patch.tools import findings

    declared = findings.declared()
    platform = look.state.plan.platform
    shown = [f for f in look.findings if every_platform or platform in declared[f.name].platforms]
    console = output.console()
    output.paragraph(console, "")
    output.rows(console, [(f.name, Text(f.status.removesuffix(" here"), _COLOURS[f.status]), _short(f)) for f in shown])


def _short(finding: "Finding") -> str:
    if finding.reason:
        return finding.reason
    variable = finding.target.removeprefix(_VARIABLE)
    return f"{variable} is {finding.how}" if _is_variable(finding) else finding.how


def _is_variable(finding: "Finding") -> bool:
    return finding.target.startswith(_VARIABLE)


def _one(look: Look, name: str) -> None:
    from bi_patch.tools import findings

    declared = findings.declared()[name]
    found = next((f for f in look.findings if f.name == name), None)
    # A variable of another platform has no finding.
    state, reason = (found.status, found.reason) if found else (findings.NOT_NEEDED, "for another platform")
    console = output.console()
    console.print(Text.assemble((name, "bold"), ": ", (state, _COLOURS[state]), f", {reason}" if reason else ""))
    for label, text in _details(declared, found):
        _field(console, label, text)


def _details(declared: "Seam | Variable", found: "Finding | None") -> list[tuple[str, str]]:
    from bi_patch.seams.model import Seam

    platforms = ", ".join(sorted(declared.platforms))
    if not isinstance(declared, Seam):
        how = f"set to {declared.value}" + ("" if declared.force else ", unless you set it")
        return [("why", declared.why), ("how", how), ("target", _VARIABLE + declared.variable), ("for", platforms)]
    causes = ", ".join(map(str, declared.causes))
    links = sorted({link for text in (declared.why, declared.how, declared.until) for link in _LINK.findall(text)})
    fields = [
        ("why", declared.why),
        ("how", declared.how),
        ("until", declared.until),
        ("target", found.target if found else ""),
        ("code", _code(declared)),
        ("causes", f"{causes} (numbers of the table in docs/causes.md)" if causes else "none of docs/causes.md"),
        ("for", platforms),
        ("needed", "required: an engine does not start while it is open" if declared.required else "optional"),
    ]
    return fields + [("link", link) for link in links]


def _code(seam: "Seam") -> str:
    """The file and line of the function that makes the replacement."""
    close = seam.close
    while isinstance(close, functools.partial):
        close = close.func
    return f"{close.__module__.replace('.', '/')}.py:{close.__code__.co_firstlineno}"


def _field(console, label: str, text: str) -> None:
    """Print a field: in a terminal, the label with the wrapped text beside it; elsewhere, one line."""
    from rich.table import Table

    if not console.is_terminal:
        output.whole(console, f"{label:8}{' '.join(text.split())}")
        return
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=7, style="dim")
    grid.add_column(overflow="fold")
    grid.add_row(label, Text(text))
    console.print(grid)
