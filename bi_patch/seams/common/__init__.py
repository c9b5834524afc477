"""Seams of vLLM common."""
