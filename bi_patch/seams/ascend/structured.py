"""Structured output on Ascend: an engine serves requests of several grammar libraries."""

from bi_patch.seams.model import Seam, Target


def _mixed(original):
    """_raise_mixed_backend: nothing, since the engine holds every library that a request chose."""

    def _raise_mixed_backend(initialized_backend, request_backend) -> None:
        pass

    return _raise_mixed_backend


SEAMS = (
    Seam(
        name="structured.ascend_mixed",
        targets=(Target("vllm_ascend.patch.platform.patch_structured_output", "_raise_mixed_backend"),),
        close=_mixed,
        why="vLLM-Ascend refuses a request whose grammar library is not that of the first structured-output request",
        how="bi_patch serves the request with its own library",
        until="vLLM-Ascend no longer checks for a single library",
        causes=(28,),
    ),
)
