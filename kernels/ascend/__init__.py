"""Kernels for Ascend NPUs, in the dialect of triton-ascend 3.2.

Each file states its order, which never depends on the number of rows.
"""
