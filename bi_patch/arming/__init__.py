"""Arming: the switch, the import hooks that close seams, child processes, and the gate before the first token."""

from bi_patch.arming.switch import State, arm, disarm, state

__all__ = ["State", "arm", "disarm", "state"]
