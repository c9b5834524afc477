"""The logits processors of verify, in the worker. They are custom processors, as users write them.

Digests hashes whole rows of logits and changes nothing, so that verify compares the full vocabulary. Each row costs a
copy of vocab_size x 4 bytes to the host. Counting chooses each token by its position in the answer, so that verify sees
which steps a processor takes part in.

vLLM hands a processor the logits of every row, and the request of each row: model runner V1 by batch updates, V2 by
request slots.
"""

from __future__ import annotations

import dataclasses
import hashlib

from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotProcessor
except ImportError:  # releases whose model runner V2 takes no processors
    SlotProcessor = LogitsProcessor

KEY = "bi_patch_digest"  # key in SamplingParams.extra_args; its value names the request's digests
FIRST = "bi_patch_first"  # key in SamplingParams.extra_args; its value is the token that Counting puts first


@dataclasses.dataclass
class Followed:
    """A request that a processor follows. value: of its extra argument. calls: used by planted faults only."""

    value: str | int
    calls: int = 0


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


class _Each(*dict.fromkeys((LogitsProcessor, SlotProcessor))):
    """A processor of the requests that have `key` in their extra arguments. It calls `see` for each of their rows."""

    batch_invariant = True
    key = ""

    def __init__(self, vllm_config, *given) -> None:
        """given: device, is_pin_memory from model runner V1; the state of the requests from V2."""
        self._rows: dict[int, tuple[Followed, list[int]]] = {}
        self._followed: dict[int, Followed] = {}  # by request slot
        self._requests = given[0]

    def see(self, followed: Followed, position: int, row) -> None:
        """Look at, or change, a row of logits [vocab] of the token at `position` of the answer."""
        raise NotImplementedError

    def is_argmax_invariant(self) -> bool:
        return False  # otherwise vLLM skips the processor when all requests are greedy

    def update_state(self, batch_update) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, parameters, _, output in batch_update.added:
            followed = self._of(parameters)
            self._rows.pop(index, None)
            if followed is not None:
                self._rows[index] = (followed, output)
        for old, new, direction in batch_update.moved:
            moved, replaced = self._rows.pop(old, None), self._rows.pop(new, None)
            if moved is not None:
                self._rows[new] = moved
            if direction == MoveDirectionality.SWAP and replaced is not None:
                self._rows[old] = replaced

    def add_request(self, slot: int, parameters) -> bool:
        followed = self._of(parameters)
        self._followed.pop(slot, None)
        if followed is not None:
            self._followed[slot] = followed
        return followed is not None

    def apply(self, logits, context=None):
        if context is None:
            for index, (followed, output) in self._rows.items():
                self.see(followed, len(output), logits[index])
            return logits
        lengths = context.seq_lens_upper_bound_np  # exact without speculation
        for row, slot in enumerate(context.idx_mapping_np.tolist()):
            position = int(lengths[row]) - int(self._requests.prompt_len.np[slot])
            if slot in self._followed and position >= 0:  # negative in an unfinished prompt
                self.see(self._followed[slot], position, logits[row])
        return logits

    def _of(self, parameters) -> Followed | None:
        value = (parameters.extra_args or {}).get(self.key)
        return None if value is None else Followed(value)


class Digests(_Each):
    """Keeps the digest of each row under the request's name. Its worker must be this process: `take` looks there."""

    key = KEY

    def see(self, followed: Followed, position: int, row) -> None:
        keep(followed.value, position, row)


class Counting(_Each):
    """Makes the token FIRST + position certain."""

    key = FIRST

    def see(self, followed: Followed, position: int, row) -> None:
        row[counted(followed, position) % row.shape[-1]] += 1000.0


def counted(followed: Followed, position: int) -> int:
    """The token for a position of the answer."""
    return followed.value + position
