"""The seams of vLLM-Ascend, one module per area.

bi_patch replaces operators that sum in PyTorch's dispatcher: the dispatch table is bi_patch/ops/ascend/dispatch.py. A seam
of this folder installs the table. The other seams close the paths that avoid it.
"""
