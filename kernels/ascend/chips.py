"""Ascend chips by the name that the CANN runtime reports, their cores and memories, and the tiles that fit
them.

The numbers are those that AscendNPU-IR's compiler (ascendnpu-ir 1.2.0) states in the modules that it writes
for each target;
tests/ascend/kernels compares. What orders a sum (BLOCK_K, row blocks, leaves) depends on no chip.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """name: as aclrtGetSocName returns it. Cores of one device; memories in KiB, ub of one vector core, the
    rest of one cube."""

    name: str
    cube_cores: int
    vector_cores: int
    ub: int
    l0a: int
    l0b: int
    l0c: int


class Tile(NamedTuple):
    """Rows, columns and depth of a matrix product's tile."""

    m: int
    n: int
    k: int


class UnknownChip(LookupError):
    """A device whose limits are not in the table."""


_A2 = (192, 64, 64, 128)
_A5 = (248, 64, 64, 256)
_TABLE = {
    "Ascend910B1": (24, _A2),
    "Ascend910B2": (24, _A2),
    "Ascend910B2C": (24, _A2),
    "Ascend910B3": (20, _A2),
    "Ascend910B4": (20, _A2),
    "Ascend910B4-1": (20, _A2),
    # A3: one die
    "Ascend910_9362": (20, _A2),
    "Ascend910_9372": (20, _A2),
    "Ascend910_9381": (24, _A2),
    "Ascend910_9382": (24, _A2),
    "Ascend910_9391": (24, _A2),
    "Ascend910_9392": (24, _A2),
    # A5
    "Ascend950PR_9579": (28, _A5),
    "Ascend950PR_957b": (28, _A5),
    "Ascend950PR_957c": (28, _A5),
    "Ascend950PR_9589": (32, _A5),
    "Ascend950PR_958a": (32, _A5),
    "Ascend950PR_9599": (36, _A5),
    "Ascend950PR_959a": (36, _A5),
    "Ascend950DT_9591": (36, _A5),
    "Ascend950DT_95A1": (36, _A5),
}
CHIPS = {name: Chip(name, cores, 2 * cores, *memories) for name, (cores, memories) in _TABLE.items()}

# The widest block of a row that a program holds; several of them, in fp32 and doubled, fit the smallest UB.
_ROW_BLOCK = 2048
# The widest head that was lowered for every chip.
MOST_HEAD = 256


def find(name: str) -> Chip:
    """The chip of that name. Raises UnknownChip, naming those that are known."""
    if name not in CHIPS:
        raise UnknownChip(f"the NPU {name!r} is not in the table of chips: {', '.join(CHIPS)}")
    return CHIPS[name]


def matmul_tile(chip: Chip, rows: int, element_size: int) -> Tile:
    """The tile for `rows` rows of elements of element_size bytes: its depth follows element_size alone.

    The largest of 16, 32, 64, 128 rows that holds them, reduced until two operand tiles fit L0A and L0B, the
    fp32
    accumulator L0C, and half of it (one of two vector cores), with a bias of its size, UB.
    """
    depth = 256 // element_size
    m = next((size for size in (16, 32, 64) if rows <= size), 128)
    n = 128

    def fits() -> bool:
        return (
            2 * m * depth * element_size <= chip.l0a * 1024
            and 2 * n * depth * element_size <= chip.l0b * 1024
            and m * n * 4 <= chip.l0c * 1024
            and 2 * (m * n * 4 // 2) * 2 <= chip.ub * 1024
        )

    while not fits():
        m, n = (m // 2, n) if m >= n else (m, n // 2)
    return Tile(m, n, depth)


def attention_rows(chip: Chip, group: int, head_size: int) -> int:
    """Rows of an attention tile: 16, 32 or 64, and no fewer than the `group` query heads that share a KV head.

    Ten tensors of fp32, [rows, 128] of scores and [rows, head_size] of outputs, must fit UB, halved over two
    vector cores. Raises ValueError for heads wider than MOST_HEAD, and for a group that does not fit.
    """
    if head_size > MOST_HEAD:
        raise ValueError(f"heads of {head_size} elements: attention holds at most {MOST_HEAD}")
    rows = 64
    while rows > 16 and rows * 10 * (128 + head_size) * 4 // 2 > chip.ub * 1024:
        rows //= 2
    if group > rows:
        raise ValueError(
            f"{group} query heads a KV head: with heads of {head_size} elements {chip.name} holds at most {rows}"
        )
    return rows


def row_block(cols: int) -> int:
    """Columns of a row that a program holds at once: the next power of two, at most 2048. Depends on cols
    alone."""
    return min(_ROW_BLOCK, max(16, 1 << (cols - 1).bit_length()))
