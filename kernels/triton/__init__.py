"""Triton kernels for CUDA devices. Each states its order of reduction; none chooses it by the number of rows."""
