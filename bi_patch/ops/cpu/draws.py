"""Random draws of seeded requests: a generator that can undo its last draw.

vLLM samples once per chunk of a prompt. It undoes the draw of every chunk but the last by moving the generator's
offset. CPU generators have no offset, so this generator keeps the state before the draw.
"""

from collections.abc import Iterable

import torch


class Rewindable(torch.Generator):
    """A CPU generator with the offset methods that vLLM calls. `set_offset` undoes all draws since `remember`."""

    _before: torch.Tensor | None = None

    def remember(self) -> None:
        """Keep the current state, so that set_offset can undo the next draw."""
        self._before = self.get_state()

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        """Undo the draws since `remember`. vLLM counts `offset` for GPUs; this generator ignores the number."""
        if self._before is not None:
            self.set_state(self._before)
            self._before = None


def rewindable(generator: torch.Generator) -> Rewindable:
    """A Rewindable in the same state as `generator`. A Rewindable is returned as it is."""
    if isinstance(generator, Rewindable):
        return generator
    twin = Rewindable()
    twin.set_state(generator.get_state())
    return twin


def remember(generators: Iterable[torch.Generator]) -> None:
    """Call `remember` on each Rewindable. vLLM's warm-up passes plain generators and never undoes their draws."""
    for generator in generators:
        if isinstance(generator, Rewindable):
            generator.remember()
