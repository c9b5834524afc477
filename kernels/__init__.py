"""Batch-invariant kernels, one subpackage per kind of device."""
