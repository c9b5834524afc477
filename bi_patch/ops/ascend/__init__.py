"""Operations on Ascend. PyTorch's dispatcher calls these functions in place of the native kernels."""
