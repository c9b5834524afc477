"""bi_patch makes vLLM batch-invariant: tokens and logprobs of a request are bitwise the same whatever runs beside it.

Importing it before vLLM arms it. BI_PATCH=0 leaves vLLM as it is.
"""

import bi_patch_entry
from bi_patch.arming import arm, disarm, state
from bi_patch.errors import BiPatchError

__version__ = "0.2.0"
__all__ = ["BiPatchError", "__version__", "arm", "disarm", "state"]

if bi_patch_entry.import_arms():
    arm()
