"""Seams of vLLM cpu."""
