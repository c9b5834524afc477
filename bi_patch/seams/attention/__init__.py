"""Seams of attention and of the rotation before it, by platform."""

from bi_patch.seams.attention import cpu, cuda

SEAMS = cuda.SEAMS + cpu.SEAMS
POLICIES = cuda.POLICIES + cpu.POLICIES
SETTINGS = cuda.SETTINGS
