"""Batch-invariant kernels, one subpackage per kind of device; README.md says how they fit together."""
