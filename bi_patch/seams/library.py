"""The names of the installed vLLM, and of a package beside vLLM, in certificates."""

import os


def vllm() -> str:
    """The installed vLLM, e.g. "vllm 0.33.0". Imports vllm.version."""
    from vllm.version import __version__

    return f"vllm {__version__}"


def humming() -> str:
    """The installed humming-kernels, e.g. "humming-kernels 0.1.19", and the variables by which the package compiles
    other code. Imports humming."""
    from humming import __version__

    given = (name for name in os.environ if name.startswith("HUMMING_") and not name.endswith("_DIR"))
    switches = (f"{name}={os.environ[name]}" for name in sorted(given))
    return " ".join(["humming-kernels", __version__, *switches])
