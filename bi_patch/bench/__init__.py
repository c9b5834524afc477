"""Measuring live engines: what is asked, what is answered, the probes along each axis, cost, and the evidence files.

Nothing here is imported by seams or kernels, and nothing imports vLLM before an engine is started.
"""
