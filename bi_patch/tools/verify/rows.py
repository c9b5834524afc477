"""A logits processor that hashes whole rows of logits and changes nothing, so that verify compares the full vocabulary.

vLLM hands the processor the logits of every sampled row, and the request of each row: model runner V1 by batch updates,
V2 by request slots. Each row costs a copy of vocab_size x 4 bytes to the host.
"""

from __future__ import annotations

import hashlib

from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotProcessor
except ImportError:  # releases whose model runner V2 takes no processors
    SlotProcessor = LogitsProcessor

KEY = "bi_patch_digest"  # key in SamplingParams.extra_args; its value names the request's digests

kept: dict[str, dict[int, str]] = {}  # name -> generated position -> digest


def take(name: str) -> list[str]:
    """Return and forget the digests of a finished request, in order of the generated positions."""
    found = kept.pop(name, {})
    return [found[i] for i in sorted(found)]


def keep(name: str, position: int, row) -> None:
    """Keep the digest of a row of logits [vocab] under a request's name."""
    content = row.detach().float().cpu().contiguous().numpy().tobytes()
    # vLLM also samples a row of an unfinished prefill and drops it: the last digest at a position counts.
    kept.setdefault(name, {})[position] = hashlib.blake2b(content, digest_size=12).hexdigest()


class Digests(*dict.fromkeys((LogitsProcessor, SlotProcessor))):
    """The logits processor. vLLM runs it in the worker, which must be this process for `take` to find the digests."""

    def __init__(self, vllm_config, *given) -> None:
        """given: device, is_pin_memory from model runner V1; the state of the requests from V2."""
        self._rows: dict[int, tuple[str, list[int]]] = {}
        self._names: dict[int, str] = {}  # by request slot
        self._requests = given[0]

    def is_argmax_invariant(self) -> bool:
        return False  # otherwise vLLM skips the processor when all requests are greedy

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
            if slot in self._names and position >= 0:  # negative in an unfinished prompt
                keep(self._names[slot], position, logits[row])
        return logits


def _name(parameters) -> str | None:
    return (parameters.extra_args or {}).get(KEY)
