"""The door to bi_patch: what other programs call by name, without arming their process by accident.

`import bi_patch` arms. This module stands beside the package, so that the .pth file, vLLM's plugin loader, the patched
modules of vLLM, the console script and pytest can decide that themselves: `without_arming()` is the one switch.
"""

import importlib
import os
import sys

_import_arms = True


def import_arms() -> bool:
    """Whether importing bi_patch arms this process; bi_patch/__init__.py asks."""
    return _import_arms


def without_arming() -> None:
    """From now on importing bi_patch does not arm this process: for tools and tests, which arm when they mean to."""
    global _import_arms
    _import_arms = False


class ArmingFailed(RuntimeError):
    """Batch invariance was asked for, and arming this process ended in an error that has no name of its own."""


class _Refusal:
    """A finder and loader before all others: vLLM is found, as those who only look for it need, and never loaded."""

    def __init__(self, reason: Exception) -> None:
        self._reason = reason

    def find_spec(self, name, path=None, target=None):
        if name != "vllm":
            return None
        # A process can have more than one refusal: the .pth file and sitecustomize both arm.
        finders = [f for f in sys.meta_path if hasattr(f, "find_spec") and not isinstance(f, _Refusal)]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is not None:
            spec.loader = self
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise self._reason


def autoload() -> None:
    """Interpreter start with VLLM_BATCH_INVARIANT=1: arm, or make importing vLLM fail with the reason.

    Python prints what a .pth file raises and goes on. So every error is kept until vLLM is imported, one of importing
    bi_patch itself included.
    """
    without_arming()
    try:
        from bi_patch import BiPatchError, arm
    except Exception as error:
        _refuse(error)
        return
    try:
        arm()
    except BiPatchError as error:
        sys.meta_path.insert(0, _Refusal(error))
    except Exception as error:
        _refuse(error)


def _refuse(cause: Exception) -> None:
    reason = ArmingFailed(
        f"VLLM_BATCH_INVARIANT=1 asks for batch invariance, and bi_patch could not arm this process ({os.getpid()}): "
        f"{type(cause).__name__}: {cause}. Fix the cause, or set BI_PATCH=0 to use vLLM's own mode"
    )
    reason.__cause__ = cause
    sys.meta_path.insert(0, _Refusal(reason))


def check() -> None:
    """vLLM's general plugin: in every vLLM process, stop unless every required seam is closed."""
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") == "1" and os.environ.get("BI_PATCH", "1") != "0":
        without_arming()
        from bi_patch.arming import startup

        startup.check()


def close(module: str) -> None:
    """Called at the end of a patched vLLM module, which is loading: close its seams where that is asked for."""
    without_arming()
    from bi_patch.arming import patched

    patched.close(module)


def run(module: str) -> None:
    """Run a tool: the function `main` of a module of bi_patch."""
    without_arming()
    importlib.import_module(module).main()


def cli() -> None:
    """The console script `bi-patch`."""
    run("bi_patch.tools.cli")
