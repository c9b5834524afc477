"""The patch series under patches/: generating it from the seams, applying it, and checking it against vLLM's sources.

Nothing here imports vLLM or torch; a release is read as text, from a wheel, a source tree or the installed package.
"""
