"""The tool verify: probes a live engine along every axis of batch invariance and finds the first op that differs."""
