"""A logits processor that changes nothing and hashes whole rows of logits, so that the full vocabulary is compared.

vLLM hands it the logits of every sampled row and which request each row belongs to: model runner V1 by batch updates,
V2 by request slots. One row costs a copy of vocab_size x 4 bytes to the host.
"""

from __future__ import annotations

import hashlib

from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotProcessor
except ImportError:  # releases whose model runner V2 takes no processors
    SlotProcessor = LogitsProcessor

KEY = "bi_patch_digest"  # in SamplingParams.extra_args: the name under which a request's digests are kept

kept: dict[str, dict[int, str]] = {}  # name -> generated position -> digest


def take(name: str) -> list[str]:
    """The digests of a request that has ended, by generated position; they are forgotten here."""
    found = kept.pop(name, {})
    return [found[i] for i in sorted(found)]


def keep(name: str, position: int, row) -> None:
    """Keep the digest of one row of logits [vocab] under a request's name."""
    content = row.detach().float().cpu().contiguous().numpy().tobytes()
    # A row of an unfinished prefill is sampled and dropped: the last one at a position is the one that counts.
    kept.setdefault(name, {})[position] = hashlib.blake2b(content, digest_size=12).hexdigest()


class Digests(*dict.fromkeys((LogitsProcessor, SlotProcessor))):
    """Lives in the worker, which must be this process."""

    def __init__(self, vllm_config, *given) -> None:
        """given: device, is_pin_memory from model runner V1; the state of the requests from V2."""
        self._rows: dict[int, tuple[str, list[int]]] = {}
        self._names: dict[int, str] = {}  # by request slot
        self._requests = given[0]

    def is_argmax_invariant(self) -> bool:
        return False  # else vLLM leaves it out when all requests are greedy

    def update_state(self, batch_update) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, parameters, _, output in batch_update.added:
            name = _name(parameters)
            self._rows.pop(index, None)
            if name is not None:
                self._rows[index] = (name, output)
        for old, new, direction in batch_update.moved:
            moved, replaced = self._rows.pop(old, None), self._rows.pop(new, None)
            if moved is not None:
                self._rows[new] = moved
            if direction == MoveDirectionality.SWAP and replaced is not None:
                self._rows[old] = replaced

    def add_request(self, slot: int, parameters) -> bool:
        name = _name(parameters)
        self._names.pop(slot, None)
        if name is not None:
            self._names[slot] = name
        return name is not None

    def apply(self, logits, context=None):
        if context is None:
            for index, (name, output) in self._rows.items():
                keep(name, len(output), logits[index])
            return logits
        lengths = context.seq_lens_upper_bound_np  # exact without speculation
        for row, slot in enumerate(context.idx_mapping_np.tolist()):
            position = int(lengths[row]) - int(self._requests.prompt_len.np[slot])
            if slot in self._names and position >= 0:  # below: a prompt that is not computed to its end yet
                keep(self._names[slot], position, logits[row])
        return logits


def _name(parameters) -> str | None:
    return (parameters.extra_args or {}).get(KEY)
