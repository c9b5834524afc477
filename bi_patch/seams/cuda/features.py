"""The features that CUDA refuses: those of the feature table."""

from bi_patch.seams import refusals

POLICIES = (refusals.policy("cuda"),)
