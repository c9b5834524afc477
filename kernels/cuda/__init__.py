"""CUDA kernels. NVRTC compiles them at run time (nvrtc.py)."""
