"""The function that patched vLLM modules call at their end: it closes the module's seams."""

import os
import sys

from bi_patch.arming import process, switch


def close(module_name: str) -> None:
    """Close the seams of the vLLM module that is loading, if VLLM_BATCH_INVARIANT=1 or this process is armed."""
    if os.environ.get(process.SWITCH, "0") != "1" and process.state() is None:
        return
    if switch.arm(by_patch=True) is not None:
        switch.close_module(sys.modules[module_name])
