"""The Ascend kernels lower to HIVM for 910B3, A3 and 950, with one K loop for every M tile, without atomics and without
an overflow of the UB."""

import functools
import importlib.util
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ascend
if importlib.util.find_spec("ascendnpuir") is None:
    pytest.skip("ascendnpu-ir is not installed: see `make test-ascend`", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))
import cases  # noqa: E402
import lowering  # noqa: E402

from bi_patch.kernels.ascend import chips  # noqa: E402


def lower(case, target):
    function, signature, constants = case
    held = {name: signature[name] for name in function.arg_names if name in signature}
    return lowering.linalg(function, held, constants, target)


@functools.cache
def every(target):
    chip = chips.find(target)
    return {
        **cases.products(chip),
        **cases.products(chip, "fp32"),
        **cases.row_kernels(chip),
        **cases.attentions(chip),
    }


@functools.cache
def lowered(target, name):
    return lower(every(target)[name], target)


def first_and_last(names):
    """Of each kernel, the first and the last form: a name is the kernel's, up to its first number."""
    forms = {}
    for name in names:
        forms.setdefault(re.split(r" \d", name)[0], []).append(name)
    return [name for held in forms.values() for name in dict.fromkeys((held[0], held[-1]))]


@pytest.mark.parametrize("target", lowering.TARGETS)
def test_every_kernel_becomes_hivm(target, tmp_path):
    """Two targets get fewer forms here: A3, which has the tiles and the compiler of 910B3, and 950, whose compiler
    takes many times as long."""
    first = target == lowering.TARGETS[0]
    becomes_hivm(every(target) if first else first_and_last(every(target)), target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", lowering.TARGETS[1:])
def test_every_form_becomes_hivm(tmp_path, target):
    becomes_hivm(every(target), target, tmp_path)


def becomes_hivm(names, target, tmp_path):
    wrong = {}
    for number, name in enumerate(names):
        ttir, linalg = lowered(target, name)
        made = lowering.hivm(linalg, tmp_path / str(number), target)
        if not made.module or made.errors:
            wrong[name] = made.errors or "no module"
        elif lowering.has_atomics(ttir) or lowering.has_atomics(made.module):
            wrong[name] = "atomics"
    assert not wrong


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("target", lowering.TARGETS)
def test_the_loop_over_depth_is_one_for_every_number_of_rows(target, dtype):
    loops, tiles = {}, set()
    for name, case in cases.products(chips.find(target), dtype).items():
        tiles.add(case[2]["BLOCK_M"])
        for loop in lowering.loops_over_depth(lowered(target, name)[0]):
            loops.setdefault((name.split()[0], loop), []).append(name)
    assert len(tiles) == 4
    assert len(loops) == 2, sorted(loops.values())  # the plain product's loop and the grouped product's loop
    depths = {case[2]["BLOCK_K"] for t in lowering.TARGETS for case in cases.products(chips.find(t), dtype).values()}
    assert len(depths) == 1


def test_a_loop_with_another_depth_is_told_apart():
    function, signature, constants = cases.products(chips.find("Ascend910B3"))["matmul bf16 rows 20 bias 0"]
    other = lower((function, signature, constants | {"BLOCK_K": 64}), "Ascend910B3")[0]
    usual = lower((function, signature, constants), "Ascend910B3")[0]
    assert lowering.loops_over_depth(other) != lowering.loops_over_depth(usual)


def test_overflow_is_seen(tmp_path):
    function, signature, constants = cases.row_kernels(chips.find("Ascend910B3"))["softmax 151936"]
    _, linalg = lower((function, signature, constants | {"BLOCK": 65536}), "Ascend910B3")
    made = lowering.hivm(linalg, tmp_path, "Ascend910B3")
    assert any("overflow" in line.lower() for line in made.errors)


@pytest.mark.parametrize("target", lowering.TARGETS)
def test_attention_that_does_not_fit_is_refused_by_name(target):
    chip = chips.find(target)
    for head in (64, 96, 128, 192, 256):
        largest = chips.attention_rows(chip, 1, head)
        assert chips.attention_rows(chip, largest, head) == largest
        with pytest.raises(ValueError, match=f"{largest + 1} query heads"):
            chips.attention_rows(chip, largest + 1, head)
    with pytest.raises(ValueError, match="heads of 512 elements"):
        chips.attention_rows(chip, 1, 512)


@pytest.mark.parametrize("name", chips.CHIPS)
def test_the_table_of_chips_is_the_compilers(name, tmp_path):
    chip = chips.find(name)
    _, linalg = lower(cases.row_kernels(chip)["sum 128"], name)
    stated = lowering.limits(lowering.hivm(linalg, tmp_path, name).module)
    assert (stated["CUBE_CORE_COUNT"], stated["VECTOR_CORE_COUNT"]) == (chip.cube_cores, chip.vector_cores)
    memories = [stated[f"{memory}_SIZE"] // 8192 for memory in ("UB", "L0A", "L0B", "L0C")]
    assert memories == [chip.ub, chip.l0a, chip.l0b, chip.l0c]
