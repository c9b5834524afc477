"""The seams of vLLM on CPU, one module per area of vLLM."""
