"""The command line `bi-patch`: one module for each command. Commands import heavy modules only when they run."""

import functools
import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from bi_patch.errors import BiPatchError, MissingDependency

# Without rich's markup, help is plain text: no boxes, one line a command.
app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
# Exit code 1 is an answer: bits differ, or a patch point is open. An error that prevents an answer has another code.
NO_ANSWER, INTERRUPTED = 2, 130


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print bi_patch's version and the vLLM found.")] = False,
) -> None:
    """bi_patch makes vLLM batch-invariant: a request has the same bits whatever runs beside it.

    Run your program armed with `bi-patch run`, look at this environment with `bi-patch status`, and prove the result
    with `bi-patch verify`.
    """
    if version:
        print(_version())
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Run the command line. Print a named error as one paragraph, any other with its traceback, and exit with 2."""
    try:
        # Each module registers its command on `app`; heavy imports stay inside the commands.
        for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
            importlib.import_module(f"{__name__}.{module}")
        for command in app.registered_commands:
            command.callback = _contained(command.callback)
        code = app(standalone_mode=False)
    except Exception as error:
        _tell(error)
        code = NO_ANSWER
    sys.exit(code)


def _version() -> str:
    """bi_patch's version, then the vLLM release and platform that arming would find; vLLM is not imported."""
    from bi_patch import __version__, installed, settings

    try:
        found = installed.find(settings.read().platform)
    except BiPatchError as error:
        return f"bi_patch {__version__}\nvLLM: {type(error).__name__}: {error}"
    return f"bi_patch {__version__}\n" + (f"vLLM {found.release} on {found.platform}" if found else "vLLM: not found")


def _contained(command: Callable) -> Callable:
    """`command` with its errors caught before typer sees them: typer exits with 1 on some errors."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except SystemExit:  # rich raises it when the reader of a pipe has gone
            raise typer.Exit(NO_ANSWER) from None
        except Exception as error:
            _tell(error)
            raise typer.Exit(NO_ANSWER) from error

    return run


_VLLMS = ("torch", "vllm")  # an environment without vLLM has neither


def _named(error: Exception) -> Exception:
    """MissingDependency for an import that an environment without vLLM cannot do, any other error as it is."""
    lacks = isinstance(error, ModuleNotFoundError) and error.name in _VLLMS and not importlib.util.find_spec(error.name)
    if not lacks:
        return error
    return MissingDependency(
        f"{error.name} is not installed in this environment. Run the command with the bi-patch of the environment that "
        "has vLLM (`bi-patch --version` names the vLLM that it finds)"
    )


def _tell(error: Exception) -> None:
    """Print a named error or a usage error as one paragraph, any other error with its traceback."""
    error = _named(error)
    if isinstance(error, BiPatchError):
        said = str(error)
    elif hasattr(error, "format_message"):  # a usage error: typer's releases define its class in different places
        command = error.ctx.command_path if getattr(error, "ctx", None) else "bi-patch"
        what = error.format_message()
        said = f"{what}{'' if what.endswith(('.', '?')) else '.'} See `{command} --help`"
    else:
        traceback.print_exception(error)
        return
    # Not as markup: the text quotes the user's input.
    text = Text.assemble((type(error).__name__, "bold red"), f": {said}")
    Console(stderr=True).print(text, soft_wrap=True)
