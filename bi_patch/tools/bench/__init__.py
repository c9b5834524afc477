"""Measuring cost on live engines, running the matrix of models, and the evidence files and plots made from them.

Nothing here is imported by seams or kernels, and nothing imports vLLM before an engine is started.
"""
