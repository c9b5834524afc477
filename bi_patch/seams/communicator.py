"""Seams of collectives between ranks. On CPU more than one rank is refused (engine.features)."""

SEAMS = ()
