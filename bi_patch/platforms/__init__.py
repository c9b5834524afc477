"""Platforms: their detection, the vLLM releases that bi_patch supports on each, and the feature table."""
