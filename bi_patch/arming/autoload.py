"""Arms at interpreter start, from bi_patch_autoload.pth or sitecustomize, when VLLM_BATCH_INVARIANT=1.

Python swallows what a .pth file raises. So an error is kept, and raised when vLLM is imported.
"""

import wrapt

from bi_patch.arming.switch import arm
from bi_patch.errors import BiPatchError


def _arm_or_block() -> None:
    try:
        arm()
    except BiPatchError as error:
        kept = error

        def refuse(module: object) -> None:
            raise kept

        wrapt.register_post_import_hook(refuse, "vllm")


_arm_or_block()
