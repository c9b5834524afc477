"""Operations on Ascend: what the dispatcher calls in place of native kernels."""
