"""Triton kernels for CUDA devices. Each file states its order, which never depends on the number of rows."""
