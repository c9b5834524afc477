"""What row certificates compare, on every platform: operations, and the numbers of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Around every power of two, because kernels change their blocks there.
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 1025)
FEW = ROWS[: ROWS.index(65) + 1]


@dataclass(frozen=True)
class RowCheck:
    """An operation to certify.

    operation, problem: as in certificates.Key. rows: the numbers of rows that are compared. make(rows, generator):
    random inputs on the generator's device, whose first dimension is rows. run(*inputs): the outputs, whose first
    dimension is rows; `run` may change its inputs. indexes: a kernel's result may be used as an index, so CUDA does not
    rehearse the operation (bi_patch.ops.cuda.ahead). library: a package beside vLLM whose kernels serve, with its
    version.
    """

    operation: str
    problem: str
    rows: tuple[int, ...]
    make: Callable[[int, torch.Generator], tuple[torch.Tensor, ...]]
    run: Callable[..., tuple[torch.Tensor, ...]]
    indexes: bool = False
    library: str = ""
