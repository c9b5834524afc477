"""The features that Ascend refuses: those of the feature table."""

from bi_patch.seams import refusals

POLICIES = (refusals.policy("ascend"),)
