"""bi_patch makes vLLM batch-invariant: a request's tokens and logprobs are bitwise the same in every batch.

Import bi_patch before vLLM to arm the process. BI_PATCH=0 leaves vLLM as it is.
"""

import bi_patch_entry
from bi_patch.arming import arm, disarm, state
from bi_patch.errors import BiPatchError
from bi_patch.seams.weights import weights_changed

__version__ = "0.2.0"
__all__ = ["BiPatchError", "__version__", "arm", "disarm", "state", "weights_changed"]

if bi_patch_entry.import_arms():
    arm()
