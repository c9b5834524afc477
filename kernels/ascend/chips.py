"""Ascend chips, by the name that the CANN runtime reports: cores, memories, and the tiles that fit.

The compiler of AscendNPU-IR (ascendnpu-ir 1.2.0) writes these numbers into its modules for each target;
tests/ascend/kernels compares them. Block sizes that are part of an order (BLOCK_K, row blocks, leaves) do not depend on
the chip.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """name: what aclrtGetSocName returns. Numbers of cores per device.

    Memories in KiB: ub per vector core; l0a, l0b and l0c per cube core.
    """

    name: str
    cube_cores: int
    vector_cores: int
    ub: int
    l0a: int
    l0b: int
    l0c: int


class Tile(NamedTuple):
    """Rows (m), columns (n) and depth (k) of a matrix product's tile."""

    m: int
    n: int
    k: int


class UnknownChip(LookupError):
    """The table has no chip of this name."""


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

# Most columns of a row that a program holds at once. Several such blocks, in fp32 and double-buffered, fit any UB.
_ROW_BLOCK = 2048
# The largest head size that the tests lower for every chip.
MOST_HEAD = 256


def find(name: str) -> Chip:
    """The chip of this name. Raises UnknownChip, which lists the known names."""
    if name not in CHIPS:
        raise UnknownChip(f"the NPU {name!r} is not in the table of chips: {', '.join(CHIPS)}")
    return CHIPS[name]


def matmul_tile(chip: Chip, rows: int, element_size: int) -> Tile:
    """The tile for `rows` rows, with elements of element_size bytes. The depth depends on element_size alone.

    The tile starts with 128 columns and the fewest of 16, 32, 64 and 128 rows that hold `rows`, at most 128. Rows or
    columns are halved until two tiles of each operand fit L0A and L0B, the fp32 accumulator fits L0C, and a vector
    core's half of the accumulator, with a bias of that size, fits UB.
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
    """Rows of an attention tile: 16, 32 or 64, and at least `group`, the query heads that share a KV head.

    Two vector cores share a tile. Half of ten fp32 pairs of scores [rows, 128] and outputs [rows, head_size] must fit
    UB. Raises ValueError for heads larger than MOST_HEAD, and for a group that does not fit.
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
    """Columns of a row that a program holds at once: the next power of two of cols, 16 to 2048."""
    return min(_ROW_BLOCK, max(16, 1 << (cols - 1).bit_length()))
