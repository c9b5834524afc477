"""The seams of vLLM-Ascend, one module per area.

bi_patch replaces the operators that sum in PyTorch's dispatcher, with the table in bi_patch/ops/ascend/dispatch.py. One
of these seams installs the table. The other seams close paths that avoid the table.
"""
