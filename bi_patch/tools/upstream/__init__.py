"""The patch series under patches/: generated from the seams, applied, and checked against vLLM's sources.

Nothing here imports vLLM or torch: a release is read as text, from a wheel, a tree or the installed package.
"""
