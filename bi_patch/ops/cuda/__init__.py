"""Operations on CUDA: certified library kernels and bundled kernels, as ops that torch.compile does not open."""
