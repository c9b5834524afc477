"""Rules on models on CPU: refuse a model whose own code depends on the batch and that no seam reaches."""

from bi_patch.seams import models

POLICIES = models.policies("cpu")
