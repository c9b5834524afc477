"""The features that CPU refuses: those of the feature table."""

from bi_patch.seams import refusals

POLICIES = (refusals.policy("cpu"),)
