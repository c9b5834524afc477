"""The command line `bi-patch`: one module per command, imported only when its command runs."""

import functools
import importlib
import pkgutil
import sys
import traceback
from collections.abc import Callable

import typer
from rich.console import Console
from rich.text import Text

from bi_patch.errors import BiPatchError

app = typer.Typer(
    help="Batch-invariant vLLM: arm it, look at its seams, prove it.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Exit code 1 is an answer (it differs, a seam is open); whatever keeps a command from answering is another.
NO_ANSWER, INTERRUPTED = 2, 130


def main() -> None:
    """Run the command line. A named error is printed as one paragraph, any other with its traceback: exit code 2."""
    try:
        # Each module registers its command on `app`; heavy imports stay inside the commands.
        for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
            importlib.import_module(f"{__name__}.{module}")
        for command in app.registered_commands:
            command.callback = _contained(command.callback)
        app()
    except Exception as error:
        _tell(error)
        sys.exit(NO_ANSWER)


def _contained(command: Callable) -> Callable:
    """`command` with its errors caught before typer sees them, which ends with 1 on some."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except SystemExit:  # rich's end where the reader of a pipe has gone
            raise typer.Exit(NO_ANSWER) from None
        except Exception as error:
            _tell(error)
            raise typer.Exit(NO_ANSWER) from error

    return run


def _tell(error: Exception) -> None:
    if isinstance(error, BiPatchError):
        # Not as markup: it names what the user gave.
        text = Text.assemble((type(error).__name__, "bold red"), f": {error}")
        Console(stderr=True).print(text, soft_wrap=True)
    else:
        traceback.print_exception(error)
