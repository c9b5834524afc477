"""bi_patch makes vLLM batch-invariant: tokens and logprobs of a request are bitwise the same whatever runs beside it.

Importing it before vLLM arms it. BI_PATCH=0 leaves vLLM as it is.
"""

import sys

from bi_patch.arming import arm, disarm, state
from bi_patch.errors import BiPatchError

__version__ = "0.1.0"
__all__ = ["BiPatchError", "__version__", "arm", "disarm", "state"]

if getattr(sys.modules.get("bi_patch_entry"), "arm_on_import", True):
    arm()
