"""Operations on CUDA by certified library kernels and bundled kernels. torch.compile does not trace into these ops."""
