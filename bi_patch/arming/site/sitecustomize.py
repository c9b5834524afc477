"""Arm a Python process at its start, then run the next sitecustomize on the path, if there is one.

`bi-patch run` and an armed parent process put this folder at the front of PYTHONPATH.
"""

import importlib.machinery
import importlib.util
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))


def _arm() -> None:
    if os.environ.get("VLLM_BATCH_INVARIANT") != "1" or os.environ.get("BI_PATCH", "1") == "0":
        return
    try:
        import bi_patch_entry
    except ModuleNotFoundError:
        return  # the interpreter of another environment, without bi_patch: nothing to arm
    bi_patch_entry.autoload()


def _next() -> None:
    rest = [p for p in sys.path if os.path.abspath(p or ".") != _here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


_arm()
_next()
