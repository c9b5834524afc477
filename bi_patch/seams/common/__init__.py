"""The seams of vLLM that every platform needs, one module per area of vLLM."""
