"""What other programs call by name: the .pth file, vLLM's plugin loader and the console script.

It stands beside the package because importing `bi_patch` arms this process, and these must decide that themselves.
"""

import os
import sys

arm_on_import = False  # read by bi_patch/__init__.py: only an explicit `import bi_patch` arms at once


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
        f"{type(cause).__name__}: {cause}. Mend that, or set BI_PATCH=0 to use vLLM's own mode"
    )
    reason.__cause__ = cause
    sys.meta_path.insert(0, _Refusal(reason))


def verify() -> None:
    """vLLM's general plugin: in every vLLM process, stop unless every required seam is closed."""
    asked = os.environ.get("VLLM_BATCH_INVARIANT", "0") == "1" and os.environ.get("BI_PATCH", "1") != "0"
    if asked or "bi_patch" in sys.modules:
        from bi_patch.arming import gate

        gate.verify()


def cli() -> None:
    """The console script `bi-patch`."""
    from bi_patch.cli import main

    main()
