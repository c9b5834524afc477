"""The entry points of bi_patch: functions that other programs call by name without arming their process by accident.

`import bi_patch` arms. This module stands beside the package, so that its callers can decide that themselves with
`without_arming()`. The callers are the .pth file, vLLM's plugin loader, PyTorch, patched vLLM modules, the console
script and pytest.
"""

import importlib
import os
import sys

_import_arms = True


def import_arms() -> bool:
    """Whether importing bi_patch arms this process. bi_patch/__init__.py calls it."""
    return _import_arms


def without_arming() -> None:
    """From now on, importing bi_patch does not arm this process. Tools and tests call it and arm on purpose."""
    global _import_arms
    _import_arms = False


class ArmingFailed(RuntimeError):
    """The environment asks for batch invariance, and an unexpected error stopped arming in this process."""


class _Refusal:
    """An import hook that finds vLLM, for code that only looks for it, and raises the reason when Python loads it."""

    def __init__(self, reason: Exception) -> None:
        self._reason = reason

    def find_spec(self, name, path=None, target=None):
        if name != "vllm":
            return None
        # A process can have two refusals, because the .pth file and sitecustomize both arm.
        finders = [f for f in sys.meta_path if hasattr(f, "find_spec") and not isinstance(f, _Refusal)]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is not None:
            spec.loader = self
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise self._reason


class _Unarmed:
    """An import hook that raises SeamOpen when a process that is not armed loads the modules of vLLM's engine."""

    _ENGINE = ("vllm.v1.engine.core", "vllm.v1.engine.core_client", "vllm.v1.worker.worker_base")

    def find_spec(self, name, path=None, target=None):
        if name in self._ENGINE and asked_for() and not _armed():
            without_arming()
            from bi_patch.errors import SeamOpen

            raise SeamOpen(
                f"VLLM_BATCH_INVARIANT=1 asks for batch invariance, but bi_patch is not armed in this process "
                f"({os.getpid()}). Import bi_patch before vllm, start the program with `bi-patch run -- ...`, or set "
                "BI_PATCH=0 to use vLLM's own mode"
            )
        return None


def asked_for() -> bool:
    """Whether the environment asks bi_patch for batch invariance."""
    return os.environ.get("VLLM_BATCH_INVARIANT", "0") == "1" and os.environ.get("BI_PATCH", "1") != "0"


def _armed() -> bool:
    process = sys.modules.get("bi_patch.arming.process")
    return process is not None and process.state() is not None


def guard() -> None:
    """PyTorch's entry point for backends: let no engine start unarmed where the .pth file does not arm.

    This is so where bi_patch is only on PYTHONPATH. vLLM's plugin loader would call `check`, but VLLM_PLUGINS can leave
    it out. The hook waits for the engine's modules: a later `import bi_patch`, or a patched vLLM, may still arm.
    """
    if asked_for() and not _armed():
        sys.meta_path.insert(0, _Unarmed())


def autoload() -> None:
    """Arm at the start of an interpreter with VLLM_BATCH_INVARIANT=1, or make `import vllm` fail with the reason.

    If a .pth file raises, Python prints the error and goes on. So this function keeps every error, also an error of
    importing bi_patch itself, until the program imports vLLM.
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
    """vLLM's general plugin: run the start-up check in every vLLM process. Raises SeamOpen or AnchorMoved."""
    if asked_for():
        without_arming()
        from bi_patch.arming import startup

        startup.check()


def close(module: str) -> None:
    """Close the seams of a vLLM module that is loading. A patched vLLM module calls it as its last line."""
    without_arming()
    from bi_patch.arming import patched

    patched.close(module)


def run(module: str) -> None:
    """Run a tool: call the function `main` of a module of bi_patch."""
    without_arming()
    importlib.import_module(module).main()


def cli() -> None:
    """The console script `bi-patch`."""
    run("bi_patch.tools.cli")
