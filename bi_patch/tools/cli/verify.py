"""`bi-patch verify` measures whether a model, engine or server is batch-invariant, bit by bit along every axis."""

import json as json_module
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bi_patch.tools import output
from bi_patch.tools.cli import app


@app.command()
def verify(
    model: Annotated[
        str, typer.Argument(help="A model's folder or name; by default the demo's model, SmolLM2-135M.")
    ] = "",
    url: Annotated[str, typer.Option(help="Verify a running server instead, e.g. http://localhost:8000.")] = "",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="At most 2 minutes for the demo's model on CPU, 3 for an 8B model on an H100."),
    ] = False,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Measure more lengths and all graph sizes; start an engine for each change. About 3 minutes for a "
            "tiny model on two CPU cores, up to hours for a large one.",
        ),
    ] = False,
    mode: Annotated[str | None, typer.Option(help="armed (default), upstream (vLLM's own mode) or stock.")] = None,
    axis: Annotated[list[str] | None, typer.Option(help="Measure only this axis, of any level; repeatable.")] = None,
    engine_arg: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for vllm.LLM; VALUE is JSON or else text; repeatable.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto (default), bfloat16, float16 or float32.")] = None,
    eager: Annotated[
        bool | None, typer.Option("--eager/--compiled", help="Default: compiled; eager with --quick on CPU.")
    ] = None,
    random_weights: Annotated[
        int | None, typer.Option(help="Use random weights of this seed; the model's folder needs only config.json.")
    ] = None,
    logits: Annotated[
        bool, typer.Option("--logits", help="Also compare digests of whole rows of logits. Not with --url.")
    ] = False,
    clients: Annotated[
        int | None, typer.Option(min=2, help="With --url: the number of concurrent clients, 256 by default.")
    ] = None,
    served_model: Annotated[str | None, typer.Option(help="With --url: the served model's name.")] = None,
    locate: Annotated[bool, typer.Option(help="When bits differ, find the first operation that differs.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one page with pictures.")] = None,
) -> None:
    """Verify that a model or a server is batch-invariant.

    The command compares a request's tokens and logprobs bitwise, alone and beside other requests, and shows where they
    differ.

    Exit code 0: bitwise invariant along every axis that applies. 1: a position differs, or products are inaccurate.
    2: something could not be checked.

    Memory: one engine at a time with vLLM's defaults, plus less than 2 GB. Time: --quick is limited; the default takes
    about 10 minutes for the demo's model, compiled, on two CPU cores; --full takes longer. The time left is shown.
    """
    from bi_patch.errors import SettingError
    from bi_patch.tools.verify import page, report, terminal
    from bi_patch.tools.verify.measure import verify as measure

    if quick and full:
        raise SettingError("--quick and --full: choose one")
    ours = {
        "MODEL": model or None,
        "--mode": mode,
        "--engine-arg": engine_arg or None,
        "--dtype": dtype,
        "--eager or --compiled": eager,
        "--random-weights": random_weights,
        "--logits": logits or None,
    }
    _refuse(
        ours if url else {"--clients": clients, "--served-model": served_model},
        "with --url, verify measures a running server" if url else "without --url, verify asks no server",
    )
    for option, path in (("--json", json), ("--html", html)):
        _check_file(option, path)
    console = output.console()
    system, level = _system(
        console,
        model,
        url,
        "quick" if quick else "full" if full else "default",
        mode or "armed",
        engine_arg,
        dtype or "auto",
        eager,
        random_weights,
        logits,
        served_model or "",
    )
    asked = f"{escape(system.name)}, {system.mode}, level {level.name}"
    console.print(f"[bold]bi_patch verify[/]: {asked}", highlight=False, soft_wrap=True)
    if not url and not axis:
        console.print(f"[dim]Expected time: {level.expected}[/]", highlight=False, soft_wrap=True)
    finder = None
    if locate and not url:
        from bi_patch.tools.verify.locate import locate as finder
    before = signal.signal(signal.SIGTERM, _interrupt)  # SIGTERM keeps the results, like an interrupt
    try:
        with terminal.Live(console) as live:
            found = measure(system, level, watcher=live, only=tuple(axis or ()), clients=clients or 256, locate=finder)
    finally:
        signal.signal(signal.SIGTERM, before)
    console.print()
    console.print(terminal.summary(found))
    written = [
        _keep(console, "Report", json, lambda path: report.write(found, path)),
        _keep(console, "Page", html, lambda path: path.write_text(page.page(found), encoding="utf-8")),
    ]
    raise typer.Exit(found.exit_code or (0 if all(written) else 2))


def _refuse(given: dict[str, object], why: str) -> None:
    from bi_patch.errors import SettingError

    named = [option for option, value in given.items() if value is not None]
    if named:
        raise SettingError(f"{why}: leave out {', '.join(named)}")


def _check_file(option: str, path: Path | None) -> None:
    """Check that the file can be written, before anything is measured. Raises SettingError."""
    from bi_patch.errors import SettingError

    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"{option} {path}: the folder cannot be made ({error.strerror})") from error
    if path.is_dir():
        raise SettingError(f"{option} {path} is a folder; name a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SettingError(f"{option} {path} cannot be written")


def _keep(console: Console, what: str, path: Path | None, write: Callable[[Path], object]) -> bool:
    """Write one result file. A failure is printed; the other files are still written."""
    if path is None:
        return True
    try:
        write(path)
    except OSError as error:
        console.print(f"{what}: {path} could not be written ({error.strerror})", soft_wrap=True, highlight=False)
        return False
    console.print(f"{what}: {path.resolve()}", soft_wrap=True, highlight=False)
    return True


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _system(console, model, url, level_name, mode, engine_arg, dtype, eager, random_weights, logits, served_model):
    """The system and the level that the command line names."""
    from bi_patch.tools.verify import levels
    from bi_patch.tools.verify.system import RunningServer

    level = levels.named(level_name)
    if url:
        return RunningServer(url, model=served_model), level
    from bi_patch.tools.verify.local import local

    system = local(
        model,
        level,
        mode=mode,
        engine_args=_arguments(engine_arg or []),
        dtype=dtype,
        eager=eager,
        random_weights=random_weights,
        logits=logits,
        tell=lambda text: console.print(f"[dim]{escape(text)}[/]"),
    )
    return system, level


def _arguments(given: list[str]) -> dict[str, object]:
    from bi_patch.errors import SettingError

    made: dict[str, object] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.replace("-", "_").isidentifier():
            raise SettingError(f"--engine-arg {text!r} is not KEY=VALUE, such as max_model_len=4096")
        try:
            made[key.replace("-", "_")] = json_module.loads(value)
        except ValueError:
            made[key.replace("-", "_")] = value
    return made
