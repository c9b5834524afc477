"""LoRA on CUDA by the bundled Triton kernels: each row's adapter in one order, whatever else the batch holds.

The order is in kernels/triton/lora.py. Chunks of K are shared out by the number of rows, which changes no bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops.registration import define

if TYPE_CHECKING:
    import torch

# By the addresses and the shapes of the stacks. An engine allocates its stacks once; a later engine of the process may
# get the same addresses.
_tables: dict[tuple, tuple] = {}


def register() -> None:
    """Define the operators of `add` and `expand`. Compiled code calls these, and cannot define an operator itself."""
    define(
        "cuda_lora(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, Tensor rows, Tensor counts, Tensor starts, "
        "Tensor slots, Tensor none, Tensor active) -> ()",
        _run,
        "CUDA",
        lambda *args: None,
    )
    define(
        "cuda_lora_expand(Tensor(a!) y, Tensor t, Tensor b, Tensor rows, Tensor counts, Tensor starts, Tensor slots, "
        "Tensor none, Tensor active) -> ()",
        _run_expand,
        "CUDA",
        lambda *args: None,
    )


def expand(y, t, b, rows, counts, starts, slots, none, active) -> None:
    """Add t b^T to y [M, N] in place, for t [M, rank], in the order of `add`, in compiled code too.

    b: [slots, 1, N, rank]. The others, and errors, are as in `add`. Call `register` first.
    """
    import torch

    torch.ops.bi_patch.cuda_lora_expand(y, t, b, rows, counts, starts, slots, none, active)


def add_rows(y, x, a, b, slots: torch.Tensor, table: torch.Tensor) -> None:
    """Add each row's adapter to y [M, N] in place, in the order of `add`, without vLLM's metadata, in eager code.

    x: [M, K]. a: [slots, 1, rank, K]. b: [slots, 1, N, rank]. slots: int64 [M], negative for a row without an adapter.
    table: int32 [slots], -1 for a slot whose adapter is left out, else the slot. Errors are as in `add`.
    """
    import torch

    # Nothing waits for the device.
    held, rows = torch.sort(slots, stable=True)
    ids = torch.arange(len(table), device=slots.device)
    starts, ends = torch.searchsorted(held, ids), torch.searchsorted(held, ids, right=True)
    _add(y, x, (a,), (b,), rows.int(), (ends - starts).int(), starts.int(), table, len(table))


def _run_expand(y, t, b, rows, counts, starts, slots, none, active) -> None:
    from bi_patch.kernels.triton import lora

    _same_type(y, t, b)
    if not len(t) or none.item():
        return
    held = 0, b, b.stride(0), b.shape[-2], True, b.shape[-2]
    t = t.contiguous()[None, None]
    lora.expand(y, t, held, b.shape[-1], 1, rows, counts, starts, slots, int(active.item()))


def _same_type(*given: torch.Tensor) -> None:
    import torch

    kinds = {held.dtype for held in given}
    if len(kinds) != 1 or kinds.isdisjoint((torch.bfloat16, torch.float16)):
        raise UnsupportedFeature(
            f"lora.cuda: an adapter's product of {', '.join(sorted(map(str, kinds)))} has no order. Use bf16 or fp16, "
            "and adapters of the model's type (--lora-dtype auto)"
        )


def add(y, x, a, b, rows, counts, starts, slots, none, active) -> None:
    """Add each row's adapter to y [M, N] in place, in compiled code too. Call `register` first.

    x: [M, K]. a, b: for each slice of y the stacks [slots, 1, rank, K] and [slots, 1, columns, rank]. The slices lie
    side by side in y. rows, counts, starts, slots, none, active: vLLM's metadata (LoRAKernelMeta.meta_args): row
    indices sorted by slot, rows of each active slot, the first of them, the active slots, whether no row has an
    adapter, how many slots to look at; the last two are on the host. y, x, a and b are bf16 or fp16.
    Raises UnsupportedFeature for other dtypes.
    """
    import torch

    torch.ops.bi_patch.cuda_lora(y, x, list(a), list(b), rows, counts, starts, slots, none, active)


def _run(y, x, a, b, rows, counts, starts, slots, none, active) -> None:
    if none.item():
        _same_type(y, x, *a, *b)
        return
    _add(y, x, a, b, rows, counts, starts, slots, int(active.item()))


def _add(y, x, a, b, rows, counts, starts, slots, active: int) -> None:
    from bi_patch.kernels.triton import lora

    _same_type(y, x, *a, *b)
    if not len(x):
        return
    of_a, of_b = _pointers(a, b, x.device)
    lora.lora(y, x.contiguous(), of_a, of_b, a[0].shape[-2], len(a), rows, counts, starts, slots, active)


def _pointers(a: list[torch.Tensor], b: list[torch.Tensor], device: torch.device) -> tuple[tuple, tuple]:
    """What the kernels need to find the stacks. Tables are made at the first call, before any graph is captured."""
    import torch

    key = len(a), *((held.data_ptr(), held.shape) for held in (*a, *b))
    if key in _tables:
        return _tables[key]
    sizes = [held.shape[-2] for held in b]
    begins = [sum(sizes[:i]) for i in range(len(b))]
    same, several = len(set(sizes)) == 1, len(a) > 1
    if not all(held.is_contiguous() for held in (*a, *b)) or len({held.shape for held in a}) != 1:
        raise UnsupportedFeature("lora.cuda: the slices of a layer have adapters of several shapes. Set BI_PATCH=0")

    def table(values, dtype):
        return torch.tensor(values, dtype=dtype, device=device)

    def weights(held):
        return table([t.data_ptr() for t in held], torch.uint64) if several else held[0]

    strides = [held.stride(0) for held in b]
    _tables[key] = (
        (weights(a), a[0].stride(0), a[0].shape[-1]),
        (
            table(begins, torch.int64) if several else 0,
            weights(b),
            strides[0] if same else table(strides, torch.int64),
            sizes[0] if same else table(sizes, torch.int64),
            same,
            max(sizes),
        ),
    )
    return _tables[key]
