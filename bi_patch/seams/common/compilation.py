"""Seams of torch.compile: compiled code is never shared between stock, armed, and another bi_patch."""

import functools
import hashlib

from bi_patch import identity
from bi_patch.seams.model import Seam, Target


def _hash(original):
    """VllmConfig.compute_hash: the key of vLLM's compile caches."""

    @functools.wraps(original)
    def compute_hash(self, *args, **kwargs):
        stock = original(self, *args, **kwargs)
        return hashlib.sha256(f"bi_patch {identity.digest()} {stock}".encode()).hexdigest()[: len(stock)]

    return compute_hash


SEAMS = (
    Seam(
        name="compilation.cache_key",
        targets=(Target("vllm.config.vllm", "VllmConfig.compute_hash"),),
        close=_hash,
        why="code compiled by stock vLLM or another bi_patch must not be loaded by an armed engine",
        how="a digest of bi_patch's sources goes into the hash that keys vLLM's compile caches",
        until="never",
        causes=(17, 18),
    ),
)
