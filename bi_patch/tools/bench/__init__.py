"""The tool bench: measures cost and the matrix of models on live engines, and makes tables and plots of the results.

No module here imports vLLM before an engine starts.
"""
