"""A logits processor that changes nothing and hashes whole rows of logits, so that the full vocabulary is compared.

vLLM hands it the logits of every sampled row and which request each row belongs to. One row costs a copy of
vocab_size x 4 bytes to the host.
"""

from __future__ import annotations

import hashlib

from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

KEY = "bi_patch_digest"  # in SamplingParams.extra_args: the name under which a request's digests are kept

kept: dict[str, dict[int, str]] = {}  # name -> generated position -> digest


def take(name: str) -> list[str]:
    """The digests of a request that has ended, by generated position; they are forgotten here."""
    found = kept.pop(name, {})
    return [found[i] for i in sorted(found)]


class Digests(LogitsProcessor):
    """Lives in the worker, which must be this process."""

    def __init__(self, vllm_config, device, is_pin_memory) -> None:
        self._rows: dict[int, tuple[str, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False  # else vLLM leaves it out when all requests are greedy

    def update_state(self, batch_update) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, parameters, _, output in batch_update.added:
            name = (parameters.extra_args or {}).get(KEY)
            self._rows.pop(index, None)
            if name is not None:
                self._rows[index] = (name, output)
        for old, new, direction in batch_update.moved:
            moved, replaced = self._rows.pop(old, None), self._rows.pop(new, None)
            if moved is not None:
                self._rows[new] = moved
            if direction == MoveDirectionality.SWAP and replaced is not None:
                self._rows[old] = replaced

    def apply(self, logits):
        for index, (name, output) in self._rows.items():
            row = logits[index].detach().float().cpu().contiguous().numpy().tobytes()
            # A row of an unfinished prefill is sampled and dropped: the last one at a position is the one that counts.
            kept.setdefault(name, {})[len(output)] = hashlib.blake2b(row, digest_size=12).hexdigest()
        return logits
