"""Generates the patch series under patches/ from the seams, applies it, and checks it against vLLM's sources.

No module here imports vLLM or torch: a release is read as text, from a wheel, a tree or the installed package.
"""
