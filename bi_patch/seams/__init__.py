"""The seams of vLLM, declared as data: one folder per platform, one module per area. `registry` collects them."""
