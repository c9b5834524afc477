"""The policy that refuses, on CUDA, every feature that the feature table marks as refused."""

from bi_patch.seams import refusals

POLICIES = (refusals.policy("cuda"),)
