"""The first fields of every result file of these scripts: device, libraries, date, and bi_patch's commit and digest."""

import importlib.metadata
from types import SimpleNamespace


def head() -> dict:
    """The fields of bi_patch.tools.evidence.Evidence as JSON types. "vllm" is "" if vLLM is not installed."""
    import msgspec
    import torch

    from bi_patch.tools import evidence

    try:
        vllm = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        vllm = ""
    found = SimpleNamespace(
        device=torch.cuda.get_device_name(), vllm=vllm, torch=str(torch.__version__), threads=torch.get_num_threads()
    )
    return msgspec.to_builtins(evidence.new(evidence.Evidence, found))
