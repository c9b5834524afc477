"""`bi-patch run -- COMMAND` runs a command and arms every Python process that the command starts."""

import os
import shutil

import typer

from bi_patch import settings
from bi_patch.arming import children
from bi_patch.errors import SettingError
from bi_patch.tools.cli import app

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


@app.command(context_settings=_PASS_ON)
def run(context: typer.Context) -> None:
    """Run a command with vLLM armed.

    Example: bi-patch run -- vllm serve Qwen/Qwen3-8B

    The command replaces this process. The environment arms the command and every Python process that it starts. With
    BI_PATCH=0 the command runs unchanged.
    """
    command = context.args
    if not command:
        raise SettingError("no command is given: write `bi-patch run -- COMMAND [ARGUMENTS]`")
    settings.read()
    program = shutil.which(command[0])
    if program is None:
        raise SettingError(f"{command[0]!r} is not a program on PATH; give its path, or activate its environment")
    os.execve(program, command, armed_environ(dict(os.environ)))


def armed_environ(environ: dict[str, str]) -> dict[str, str]:
    """`environ` with the variables that arm a Python process and its children; unchanged when it has BI_PATCH=0."""
    if environ.get("BI_PATCH") == "0":
        return environ
    path = children.python_path(environ.get("PYTHONPATH", ""))
    return environ | {"VLLM_BATCH_INVARIANT": "1", "PYTHONPATH": path}
