"""Random draws of seeded requests: a generator whose last draw can be taken back.

A prompt that is computed in chunks samples once a chunk, and vLLM takes all but the last draw back by moving the
generator's offset. CPU generators have no offset, so the state before the draw is kept instead.
"""

from collections.abc import Iterable

import torch


class Rewindable(torch.Generator):
    """A CPU generator with the offset interface that vLLM uses: `set_offset` undoes the draw since `remember`."""

    _before: torch.Tensor | None = None

    def remember(self) -> None:
        """Keep the state: the next draw can be taken back."""
        self._before = self.get_state()

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        """Take the last draw back; the size of the step is vLLM's count for GPUs and means nothing here."""
        if self._before is not None:
            self.set_state(self._before)
            self._before = None


def rewindable(generator: torch.Generator) -> Rewindable:
    """A rewindable generator in the same state; one that is rewindable already is returned as it is."""
    if isinstance(generator, Rewindable):
        return generator
    twin = Rewindable()
    twin.set_state(generator.get_state())
    return twin


def remember(generators: Iterable[torch.Generator]) -> None:
    """Keep the state of each rewindable generator (warm-up runs pass plain ones, which are never taken back)."""
    for generator in generators:
        if isinstance(generator, Rewindable):
            generator.remember()
