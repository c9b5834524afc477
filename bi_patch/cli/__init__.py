"""The command line `bi-patch`: one module per command, imported only when its command runs."""

import importlib
import pkgutil
import sys

import typer
from rich.console import Console

from bi_patch.errors import BiPatchError

app = typer.Typer(
    help="Batch-invariant vLLM: arm it, look at its seams, prove it.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)



def main() -> None:
    """Run the command line; a named error is printed in one paragraph, without a traceback, and exits with 2."""
    # Each module registers its command on `app`; heavy imports stay inside the commands.
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{module}")
    try:
        app()
    except BiPatchError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
