"""The name of the installed vLLM in certificates."""


def vllm() -> str:
    """The installed vLLM, e.g. "vllm 0.33.0". Imports vllm.version."""
    from vllm.version import __version__

    return f"vllm {__version__}"
