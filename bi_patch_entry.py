"""What other programs call by name: the .pth file, vLLM's plugin loader and the console script.

It stands beside the package because importing `bi_patch` arms this process, and these must decide that themselves.
"""

import os
import sys

arm_on_import = False  # read by bi_patch/__init__.py: only an explicit `import bi_patch` arms at once


def autoload() -> None:
    """Interpreter start with VLLM_BATCH_INVARIANT=1: arm, or make importing vLLM fail with the reason."""
    import bi_patch.arming.autoload  # noqa: F401


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
