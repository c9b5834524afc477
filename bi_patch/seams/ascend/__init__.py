"""Seams of vLLM-Ascend, one module per area, as in bi_patch/seams.

What sums is replaced where PyTorch dispatches it (bi_patch/ops/ascend/dispatch.py); these seams install that, and
close what would choose another way around it.
"""
