"""Bundled CUDA kernels, compiled at run time (nvrtc.py)."""
