"""The policy that refuses, on Ascend, every feature that the feature table marks as refused."""

from bi_patch.seams import refusals

POLICIES = (refusals.policy("ascend"),)
