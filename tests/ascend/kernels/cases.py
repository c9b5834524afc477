"""Every Ascend kernel with the tiles that each chip gets: name -> (function, signature, constants)."""

import triton

from bi_patch.kernels.ascend import attention, chips, matmul, pointwise, rows


def _i32(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def _matmul(chip, dtype, size, count, bias):
    tile = chips.matmul_tile(chip, count, size)
    signature = dict.fromkeys(("x", "w", "bias", "out"), f"*{dtype}")
    signature |= _i32(
        "rows cols depth tiles stride_xb stride_xm stride_xk stride_wb stride_wk stride_wn stride_ob stride_om"
    )
    signature |= _i32("stride_bb stride_bm stride_bn") | {"alpha": "fp32", "beta": "fp32"}
    constants = {"BIAS": bias, "SCALED": bias == 2, "PROGRAMS": chip.cube_cores}
    constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    return matmul._matmul, signature, constants


def _grouped(chip, dtype, size, count):
    tile = chips.matmul_tile(chip, count, size)
    signature = dict.fromkeys(("x", "w", "bias", "out"), f"*{dtype}") | {"groups": "*i64"}
    signature |= _i32("experts cols depth stride_xm stride_we stride_wk stride_wn stride_om stride_be")
    constants = {"HAS_BIAS": True, "IS_COUNTS": True, "PROGRAMS": chip.cube_cores}
    constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    return matmul._grouped, signature, constants


def products(chip: chips.Chip, dtype: str = "bf16") -> dict[str, tuple]:
    """Each product for 1, 20, 50 and 4096 rows; the plain product with every kind of bias."""
    size = 4 if dtype == "fp32" else 2
    cases = {}
    for count in (1, 20, 50, 4096):
        for bias in (0, 1, 2):
            cases[f"matmul {dtype} rows {count} bias {bias}"] = _matmul(chip, dtype, size, count, bias)
        cases[f"grouped {dtype} rows {count}"] = _grouped(chip, dtype, size, count)
    return cases


def row_kernels(chip: chips.Chip) -> dict[str, tuple]:
    """The kernels over rows, for rows of a head's width and for the widest rows."""
    cases = {}
    for cols in (128, 151936):
        programs = {"PROGRAMS": chip.vector_cores, "BLOCK": chips.row_block(cols)}
        signature = dict.fromkeys(("x", "residual", "weight", "out", "summed"), "*bf16") | _i32("rows cols stride_row")
        norm = {"HAS_RESIDUAL": True, "HAS_WEIGHT": True, **programs}
        cases[f"norm {cols}"] = (rows._rms_norm, signature | {"eps": "fp32", "offset": "fp32"}, norm)
        plain = {"x": "*bf16", "out": "*fp32"} | _i32("rows cols stride_row")
        cases[f"softmax {cols}"] = (rows._softmax, plain, {"IS_LOG": False, **programs})
        cases[f"log_softmax {cols}"] = (rows._softmax, plain, {"IS_LOG": True, **programs})
        cases[f"sum {cols}"] = (rows._total, plain, {"IS_MEAN": False, **programs})
        cases[f"mean {cols}"] = (rows._total, plain, {"IS_MEAN": True, **programs})
        cases[f"cumsum {cols}"] = (rows._cumsum, plain, programs)
        weighted = {"x": "*bf16", "at": "*i32", "probs": "*fp32", "out": "*bf16"} | _i32("rows cols top_k stride_row")
        cases[f"weighted {cols}"] = (rows._weighted, weighted, {"HAS_PROBS": True, **programs})
        swiglu = {"x": "*bf16", "out": "*bf16"} | _i32("rows half stride_row")
        cases[f"swiglu {cols}"] = (pointwise._swiglu, swiglu, programs)
    rotate = {"positions": "*i64"} | dict.fromkeys(("x", "cache", "out"), "*bf16")
    rotate |= _i32("rows heads head_size half stride_row stride_cache")
    for half, rest in ((64, 0), (16, 32)):
        constants = {"PROGRAMS": chip.vector_cores, "HALF": half, "REST": max(1, rest), "HAS_REST": rest > 0}
        cases[f"rotate {half} {rest}"] = (pointwise._rotate, rotate, constants)
    return cases


# Head size, query heads per KV head (None: as many as the chip holds), paged or not.
HEADS = (
    (64, 8, True),
    (64, None, True),
    (96, 8, True),
    (128, 4, True),
    (128, 1, False),
    (128, None, True),
    (192, 8, True),
    (256, None, True),
    (256, 1, False),
)


def attentions(chip: chips.Chip) -> dict[str, tuple]:
    """Both forms of attention (whole, and by leaves that are merged), for each entry of HEADS."""
    cases = {}
    for head, group, paged in HEADS:
        group = group or chips.attention_rows(chip, 1, head)
        count = chips.attention_rows(chip, group, head)
        width = triton.next_power_of_2(head)
        shape = {
            "ROWS": count,
            "LEAF": attention.LEAF,
            "DIM": width,
            "DIM_V": width,
            "PROGRAMS": chip.cube_cores,
        }
        flags = {"PAGED": paged, "CAUSAL": True, "BLOCK_SIZE": 128}
        tensors = dict.fromkeys(("query", "key", "value"), "*bf16") | {"table": "*i32", "tiles": "*i32"}
        numbers = _i32(
            "kv_heads queries_per_kv stride_qt stride_qh stride_kt stride_kh stride_vt stride_vh stride_table"
        )
        numbers |= {"scale": "fp32"} | _i32("window d_qk d_v")
        parts = dict.fromkeys(("part_m", "part_l", "part_o"), "*fp32")
        name = f"head {head} group {group} {'paged' if paged else 'flat'}"
        whole = tensors | {"sinks": "*fp32", "out": "*bf16", "count": "i32"} | numbers
        cases[f"attention whole {name}"] = (attention._whole, whole, flags | shape | {"HAS_SINK": False})
        leaves = tensors | parts | _i32("count most_leaves") | numbers
        cases[f"attention leaves {name}"] = (attention._leaves, leaves, flags | shape)
        merge = {"tiles": "*i32", "sinks": "*fp32", "out": "*bf16", **parts}
        merge |= _i32("count most_leaves kv_heads queries_per_kv d_v")
        constants = {k: v for k, v in shape.items() if k != "DIM"} | {"CAUSAL": True, "HAS_SINK": False}
        constants["PROGRAMS"] = chip.vector_cores
        cases[f"attention merge {name}"] = (attention._merge, merge, constants)
    return cases
