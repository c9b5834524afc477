"""The seams of vLLM as data: one folder per platform, one module per area of vLLM. `registry` collects them."""
