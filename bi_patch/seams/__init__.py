"""The seams of vLLM, declared as data: one module per area. `registry` collects them."""

from bi_patch.seams.model import Policy, Seam, Setting, Target
from bi_patch.seams.registry import POLICIES, RELEASES, SEAMS, SETTINGS

__all__ = ["POLICIES", "RELEASES", "SEAMS", "SETTINGS", "Policy", "Seam", "Setting", "Target"]
