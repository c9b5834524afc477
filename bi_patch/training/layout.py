"""Where the sequences of a batch lie: one first row and one length a sequence, whatever the form of the batch.

A batch of shape [B, T] has B * T rows. Its form is padded (a mask), packed (positions that begin anew, or cumulative
lengths), or full. These functions are operators of their own, so that compiled code keeps their checks.
"""

from __future__ import annotations

import torch

from bi_patch.errors import UnsupportedRequest

_library = torch.library.Library("bi_training", "FRAGMENT")


def padded(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """starts and lengths [B] int64 of a padding mask [B, T], whose ones are one run a row, at any side.

    Raises UnsupportedRequest for another mask.
    """
    return torch.ops.bi_training.padded(mask)


def packed(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """starts and lengths [sequences] int64 of positions [B, T], which begin at 0 in each row and for each sequence."""
    return torch.ops.bi_training.packed(positions)


def cumulative(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """starts and lengths [sequences] int64 of cumulative lengths [sequences + 1], as attention kernels take them."""
    lengths = lengths.to(torch.int64)
    return lengths[:-1], lengths.diff()


def full(batch: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """starts and lengths [B] int64 of a batch [B, T] without padding."""
    return torch.arange(batch, device=device) * tokens, torch.full((batch,), tokens, device=device)


def positions(
    starts: torch.Tensor,
    lengths: torch.Tensor,
    rows: int,
    given: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row's position in its sequence [rows] int64, 0 for padding.

    given: the caller's positions [rows], or None. mask: the caller's padding mask [B, T] beside sequences that do not
    come from it, or None. Raises UnsupportedRequest if positions differ in a row of a sequence, if the mask says other
    sequences, or if a sequence reaches beyond the rows.
    """
    return torch.ops.bi_training.positions(starts, lengths, rows, given, mask)


def rows_of(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The rows of all sequences [tokens] int64, sequence by sequence."""
    return _rows_of(starts, lengths, int(lengths.sum()))


def _rows_of(starts: torch.Tensor, lengths: torch.Tensor, tokens: int) -> torch.Tensor:
    """As rows_of. tokens: the sum of lengths, so that the host need not ask the device."""
    shift = (starts - lengths.cumsum(0) + lengths).repeat_interleave(lengths, output_size=tokens)
    return torch.arange(tokens, device=starts.device) + shift


def _padded(mask):
    batch, tokens = mask.shape
    held = mask != 0
    lengths = held.sum(1)
    first = held.to(torch.int8).argmax(1)
    at = torch.arange(tokens, device=mask.device)
    run = (at >= first[:, None]) & (at < (first + lengths)[:, None])
    if bool(((run != held) | (mask != 0) & (mask != 1)).any()):
        raise UnsupportedRequest(
            "training.mask: the attention mask is no padding mask. A padding mask [B, T] holds 0 and 1, and the ones "
            "of a row are neighbours. Pack sequences by position_ids or cu_seq_lens_q instead"
        )
    return first + torch.arange(batch, device=mask.device) * tokens, lengths


def _packed(positions):
    flat = positions.reshape(-1)
    starts = (flat == 0).nonzero()[:, 0]
    ends = torch.cat((starts[1:], starts.new_tensor([flat.shape[0]])))
    if not bool((positions[:, 0] == 0).all()):
        raise UnsupportedRequest(
            "training.positions: position_ids must begin at 0 in each row of the batch. Give an attention_mask for a "
            "batch that is padded on the left"
        )
    return starts, ends - starts


def _positions(starts, lengths, rows, given, mask):
    tokens = 0
    if len(starts):  # the host asks the device once
        end, begin, tokens = torch.stack(((starts + lengths).max(), starts.min(), lengths.sum())).tolist()
    if len(starts) and (end > rows or begin < 0):
        raise UnsupportedRequest(
            f"training.layout: the sequences reach beyond the {rows} tokens of the batch. Give lengths that end there"
        )
    if mask is not None:
        pairs = [torch.stack(pair, 1) for pair in (_padded(mask), (starts, lengths))]
        theirs, ours = (pair[pair[:, 1] > 0] for pair in pairs)
        if not torch.equal(theirs, ours.to(theirs.dtype)):
            raise UnsupportedRequest(
                "training.mask: the attention mask and the cumulative lengths say different sequences. Give "
                "the lengths alone"
            )
    at = _rows_of(starts, lengths, tokens)
    found = starts.new_zeros(rows)
    found[at] = at - starts.repeat_interleave(lengths, output_size=tokens)
    if given is not None and not torch.equal(found[at], given[at].to(found.dtype)):
        raise UnsupportedRequest(
            "training.positions: the sampler counts positions from the first token of each sequence, and position_ids "
            "do not. Leave them out for a padded batch"
        )
    return found


def _packed_fake(positions):
    count = torch.library.get_ctx().new_dynamic_size()
    return positions.new_empty(count), positions.new_empty(count)


_library.define("padded(Tensor mask) -> (Tensor, Tensor)")
_library.define("packed(Tensor positions) -> (Tensor, Tensor)")
_library.define("positions(Tensor starts, Tensor lengths, SymInt rows, Tensor? given, Tensor? mask) -> Tensor")
for _name, _run, _fake in (
    ("padded", _padded, lambda mask: tuple(mask.new_empty(mask.shape[0], dtype=torch.int64) for _ in range(2))),
    ("packed", _packed, _packed_fake),
    ("positions", _positions, lambda starts, lengths, rows, given, mask: starts.new_empty(rows)),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bi_training::{_name}", _fake, lib=_library)
