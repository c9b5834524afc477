"""The seams of vLLM on CUDA, one module per area of vLLM."""
