"""Rotary embedding on Ascend by the bundled kernel."""

from __future__ import annotations

from bi_patch.ops.ascend import machine


def rotate(positions, query, key, cache, head_size: int):
    """Rotary embedding, neox style, of query [T, Hq * head_size] and key [T, Hk * head_size] (or None).

    positions: [T] integers. cache: [P, rotary], cosines, then sines. Returns (query, key) rotated, of the same shapes.
    """
    from bi_patch.kernels.ascend import pointwise

    turned = [pointwise.rotate(positions, x, cache, head_size, machine.chip()) for x in (query, key) if x is not None]
    return turned[0], turned[1] if key is not None else None
