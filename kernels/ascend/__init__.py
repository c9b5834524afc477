"""Kernels for Ascend NPUs in triton-ascend's dialect (3.2). Each states its order of reduction; none chooses
it by rows."""
