"""`bi-patch parity` compares a Hugging Face trainer with its sampler, bit by bit, and trains both twice with GRPO."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bi_patch.tools import output
from bi_patch.tools.cli import app
from bi_patch.tools.cli import verify as shared


@app.command()
def parity(
    model: Annotated[
        str, typer.Argument(help="A model's folder or name, such as tiny-qwen3; by default SmolLM2-135M.")
    ] = "",
    steps: Annotated[int, typer.Option(min=1, help="GRPO steps of each of the two runs.")] = 6,
    micro: Annotated[
        str, typer.Option(help="Sequences in a micro-batch, in the first and in the second run of GRPO.")
    ] = "24,5",
    seats: Annotated[
        str, typer.Option(help="Requests that the sampler runs together, in the first and in the second run.")
    ] = "64,7",
    mode: Annotated[str, typer.Option(help="armed, or stock: Hugging Face and vLLM as they are.")] = "armed",
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the rollouts in GRPO.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Of the rollouts in GRPO; 0 for all tokens.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Of the rollouts in GRPO.")] = 1.0,
    line: Annotated[list[str] | None, typer.Option(help="Measure only this line of the report; repeatable.")] = None,
    engine_arg: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for vllm.LLM; VALUE is JSON or else text; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    eager: Annotated[bool, typer.Option("--eager/--compiled", help="How the sampler runs.")] = True,
    locate: Annotated[bool, typer.Option(help="When bits differ, find the first operation that differs.")] = True,
    faults: Annotated[
        bool, typer.Option("--faults", help="Plant each known fault, and test whether parity names it.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one page with pictures.")] = None,
) -> None:
    """Compare a trainer with its sampler, bit by bit.

    The command starts a sampler (vLLM) and a trainer (Hugging Face transformers) with the same weights in one process.
    It compares logprobs of padded and packed batches, kinds of sampling, weight updates, and the gradients of other
    micro-batches. Then GRPO runs twice, with other sizes, and must end with the same weights.

    Sampler and trainer share one device: the CPU, or a Hopper GPU. On a GPU, the sampler takes 0.4 of the memory. For
    another share, give --engine-arg gpu_memory_utilization=SHARE.

    Exit code 0: no bit differs. 1: a bit differs. 2: something could not be compared. With --faults, 0: every fault was
    caught and named.

    Memory: one engine with vLLM's defaults, and about 20 bytes for each weight of the trainer.
    """
    from bi_patch.errors import SettingError
    from bi_patch.tools.parity import faults as planted
    from bi_patch.tools.parity import report, run
    from bi_patch.tools.parity.plan import Plan
    from bi_patch.tools.verify import levels, page, terminal
    from bi_patch.tools.verify import report as verify_report
    from bi_patch.tools.verify.local import local

    if mode not in ("armed", "stock"):
        raise SettingError(f"--mode {mode!r} is not understood; use armed or stock")
    for option, path in (("--json", json), ("--html", html)):
        shared._check_file(option, path)
    plan = Plan(
        steps=steps,
        micro=_pair("--micro", micro),
        seats=_pair("--seats", seats),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    shared_device = run.shared()
    console = output.console()
    system = local(
        model,
        levels.QUICK,
        mode=mode,
        engine_args={"logprobs_mode": "processed_logprobs"} | shared_device | shared._arguments(engine_arg or []),
        dtype=dtype,
        eager=eager,
        tell=lambda text: console.print(f"[dim]{escape(text)}[/]"),
    )
    asked = f"{escape(system.name)}, {system.mode}, {'eager' if eager else 'compiled'}"
    console.print(f"[bold]bi_patch parity[/]: {asked}", highlight=False, soft_wrap=True)
    if faults:
        found = planted.catch_all(system, tell=lambda text: output.whole(console, text))
        raise typer.Exit(0 if all(f.caught and f.named for f in found) else 1)
    with terminal.Live(console) as live:
        found = run.measure(system, plan, only=tuple(line or ()), watcher=live, locate=locate)
    console.print()
    console.print(terminal.summary(found))
    written = [
        shared._keep(console, "Report", json, lambda path: verify_report.write(found, path)),
        shared._keep(
            console,
            "Page",
            html,
            lambda path: path.write_text(page.page(found, report.steps(found)), encoding="utf-8"),
        ),
    ]
    raise typer.Exit(found.exit_code or (0 if all(written) else 2))


def _pair(option: str, text: str) -> tuple[int, int]:
    from bi_patch.errors import SettingError

    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise SettingError(f"{option} {text!r} is not two numbers above 0 with a comma, such as 24,5")
    return int(parts[0]), int(parts[1])
