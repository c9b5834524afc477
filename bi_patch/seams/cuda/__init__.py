"""Seams of vLLM cuda."""
