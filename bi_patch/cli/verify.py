"""`bi-patch verify`: is this model, engine or server batch-invariant? Every axis measured, bit by bit."""

import json as json_module
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bi_patch.cli import app


@app.command()
def verify(
    model: Annotated[
        str, typer.Argument(help="A model's folder or name, or one of the demo's models; by default SmolLM2-135M.")
    ] = "",
    url: Annotated[str, typer.Option(help="Verify a running server instead, e.g. http://localhost:8000.")] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="At most 2 minutes for the demo's model on CPU, 3 for 8B on an H100.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Everything: more lengths, all graph sizes, one engine per change.")
    ] = False,
    mode: Annotated[str, typer.Option(help="armed, upstream (vLLM's own mode) or stock.")] = "armed",
    axis: Annotated[list[str] | None, typer.Option(help="Only this axis, of any level; repeatable.")] = None,
    engine_arg: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for vllm.LLM, the value in JSON where it can be; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    eager: Annotated[
        bool | None, typer.Option("--eager/--compiled", help="Default: compiled; eager with --quick on CPU.")
    ] = None,
    random_weights: Annotated[
        int | None, typer.Option(help="Fill the model with random weights of this seed: config.json is enough.")
    ] = None,
    logits: Annotated[
        bool, typer.Option("--logits", help="Also compare whole rows of logits, by digest. In process only.")
    ] = False,
    clients: Annotated[int, typer.Option(min=2, help="With --url: so many clients at once.")] = 256,
    served_model: Annotated[str, typer.Option(help="With --url: the served model's name.")] = "",
    locate: Annotated[
        bool, typer.Option(help="Where bits differ, find the first operation that does.")
    ] = True,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one page with pictures.")] = None,
) -> None:
    """Prove that a request's tokens and logprobs do not depend on what runs beside it, or show where they do.

    Exit code 0: bitwise invariant along every axis that applies. 1: something differs. 2: it could not be checked.

    Memory: one engine at a time, with vLLM's own settings; the rest stays under 1 GB. Times: see --quick; the default
    and --full have no limit: about 10 minutes (default) for the demo's model, compiled, on two busy CPU cores.
    """
    from bi_patch.errors import SettingError
    from bi_patch.verify import page, report, terminal
    from bi_patch.verify.measure import verify as measure

    if quick and full:
        raise SettingError("--quick and --full: choose one")
    if mode not in ("armed", "upstream", "stock"):
        raise SettingError(f"--mode {mode!r} is not understood; use armed, upstream or stock")
    if url and (model or engine_arg or random_weights is not None or logits):
        raise SettingError("--url names a server that runs already: no MODEL, --engine-arg, --random-weights, --logits")
    console = Console()
    target, level = _target(console, model, url, "quick" if quick else "full" if full else "default", mode, engine_arg,
                            dtype, eager, random_weights, logits, served_model)  # fmt: skip
    console.print(
        f"[bold]bi_patch verify[/]: {target.name}, {target.mode}, level {level.name}", highlight=False, soft_wrap=True
    )
    before = signal.signal(signal.SIGTERM, _interrupt)  # what was compared is kept then, too
    try:
        with terminal.Live(console) as live:
            found = measure(target, level, watcher=live, only=tuple(axis or ()), clients=clients,
                            locate=_locate() if locate and not url else None)  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, before)
    console.print()
    console.print(terminal.summary(found))
    if json is not None:
        report.write(found, json)
        console.print(f"Report: {json}", soft_wrap=True, highlight=False)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page.page(found), encoding="utf-8")
        console.print(f"Page: {html.resolve()}", soft_wrap=True, highlight=False)
    raise typer.Exit(found.exit_code)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _target(console, model, url, level_name, mode, engine_arg, dtype, eager, random_weights, logits, served_model):
    """The target and the level that the command line asks for."""
    from bi_patch.verify import levels
    from bi_patch.verify.targets import Running

    level = levels.LEVELS[level_name]
    if url:
        return Running(url, model=served_model), level
    from bi_patch.verify.local import local

    target = local(
        model, level, mode=mode, engine_args=_arguments(engine_arg or []), dtype=dtype, eager=eager,
        random_weights=random_weights, logits=logits, tell=lambda text: console.print(f"[dim]{text}[/]"),
    )  # fmt: skip
    return target, level


def _arguments(given: list[str]) -> dict[str, object]:
    from bi_patch.errors import SettingError

    made: dict[str, object] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.replace("-", "_").isidentifier():
            raise SettingError(f"--engine-arg {text!r} is not understood; write KEY=VALUE, e.g. max_model_len=4096")
        try:
            made[key.replace("-", "_")] = json_module.loads(value)
        except ValueError:
            made[key.replace("-", "_")] = value
    return made


def _locate():
    """What finds the first operation that differs."""
    try:
        from bi_patch.verify.locate import locate
    except ImportError:
        return None
    return locate
