"""Probes of a live engine along every axis of batch invariance, planted faults, and the first op that differs."""
