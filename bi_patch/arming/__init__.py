"""Arming: the switch, the import hooks that close seams, child processes, and the start-up check."""

from bi_patch.arming.process import State, state
from bi_patch.arming.switch import arm, disarm

__all__ = ["State", "arm", "disarm", "state"]
