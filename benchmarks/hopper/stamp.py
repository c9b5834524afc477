"""What every result file of these scripts begins with: device, libraries, date, and which bi_patch measured."""

import importlib.metadata
from types import SimpleNamespace


def head() -> dict:
    """The fields of bi_patch.tools.evidence.Evidence, as JSON holds them; "" for a library that is not installed."""
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
