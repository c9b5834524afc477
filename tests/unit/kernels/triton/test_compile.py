"""The Triton kernels compile for every NVIDIA architecture from Ampere on, without a GPU."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bi_patch.kernels.triton import (
    attention_backward,
    block_experts,
    chains,
    drafts,
    eighths,
    embedding_backward,
    expert_lora,
    gated_backward,
    gemm,
    heads,
    leaves,
    logits_backward,
    lora,
    norm,
    norm_backward,
    pooling,
    rank_norm,
    ranks,
    reduce,
    rope,
    scaled_gemm,
)

# A100, RTX 30, RTX 40 and L4, Hopper, B200, RTX 50. RTX 30 has RTX 40's shared memory and its instructions for 16 bits;
# FP8 is not compiled for RTX 30.
ARCHITECTURES = (80, pytest.param(86, marks=pytest.mark.slow), 89, 90, 100, 120)
# Bytes of shared memory that a block may use.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


def build(function, signature, constants, architecture, **options):
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_gemm(architecture, rows):
    tile = gemm.choose(rows, 4096, 4096, 2, SHARED[architecture], 132, False)[0].tile
    pointers = dict.fromkeys(("x", "w", "bias", "out"), "*bf16")
    sizes = dict.fromkeys(("rows", "cols", "depth", "stride_x", "stride_w", "stride_out"), "i32")
    constants = {"HAS_BIAS": True, "EVEN_K": True, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": 8}
    built = build(gemm._tile, pointers | sizes, constants, architecture, num_warps=tile.warps, num_stages=tile.stages)
    assert built.metadata.shared <= SHARED[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("number", "depth", "cols"), [(16, 128, 512), (16, 512, 128), (128, 128, 512)])
def test_heads(architecture, number, depth, cols):
    strides = {f"stride_{of}": "i32" for of in ("ah", "am", "ak", "bh", "bk", "bn", "oh", "om", "on")}
    constants = {"COLS": cols, "DEPTH": depth, "BLOCK_M": heads.BLOCK_M, "BLOCK_K": heads.BLOCK_K}
    constants["BLOCK_N"] = heads.block_n(number, depth, cols)
    signature = dict.fromkeys(("a", "b", "out"), "*bf16") | {"rows": "i32"} | strides
    built = build(heads._heads, signature, constants, architecture, num_warps=4, num_stages=3)
    assert built.metadata.shared <= SHARED[architecture]


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("rows", [33, 128, 256, 4096])
def test_persistent(architecture, rows):
    tile = gemm.choose(rows, 4096, 4096, 2, SHARED[architecture], 132, True)[-1].tile
    assert tile.persistent
    signature = {
        "x": f"tensordesc<bf16[{tile.m}, {tile.k}]>",
        "w": f"tensordesc<bf16[{tile.n}, {tile.k}]>",
        "bias": "*bf16",
        "out": f"tensordesc<bf16[{tile.m}, {tile.n}]>",
        "rows": "i32",
        "cols": "i32",
        "depth": "i32",
    }
    constants = {"HAS_BIAS": False, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": 8}
    built = build(gemm._persistent, signature, constants, architecture, num_warps=tile.warps, num_stages=tile.stages)
    assert built.metadata.shared <= SHARED[architecture]


_SCALED = dict.fromkeys(("x_scale", "w_scale"), "*fp32") | {"bias": "*bf16"}
_SCALED |= dict.fromkeys(("rows", "cols", "depth", "stride_xs_m", "stride_xs_k", "stride_ws_n"), "i32")


@pytest.mark.parametrize("architecture", [89, 90, 100, 120])
@pytest.mark.parametrize("rows", [1, 32, 64, 4096])
@pytest.mark.parametrize("grouped", [False, True])
def test_scaled(architecture, rows, grouped):
    tile = scaled_gemm.choose(rows, 4096, SHARED[architecture], False, grouped)
    pointers = {"x": "*fp8e4nv", "w": "*fp8e4nv", "out": "*bf16"}
    strides = dict.fromkeys(("stride_x", "stride_w", "stride_out"), "i32")
    constants = {"HAS_BIAS": True, "GROUPED": grouped, "SWAP": tile.swap, "EVEN_K": True, "GROUP": 8}
    constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": 128 if grouped else tile.k}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    built = build(scaled_gemm._tile, pointers | _SCALED | strides, constants, architecture, **options)
    assert built.metadata.shared <= SHARED[architecture]


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("rows", [128, 4096])
@pytest.mark.parametrize("grouped", [False, True])
def test_scaled_persistent(architecture, rows, grouped):
    tile = scaled_gemm.choose(rows, 4096, SHARED[architecture], True, grouped)
    assert tile.persistent
    described = {
        "x": f"tensordesc<fp8e4nv[{tile.m}, {tile.k}]>",
        "w": f"tensordesc<fp8e4nv[{tile.n}, {tile.k}]>",
        "out": f"tensordesc<bf16[{tile.m}, {tile.n}]>",
    }
    constants = {"HAS_BIAS": False, "GROUPED": grouped, "GROUP": 8}
    constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    built = build(scaled_gemm._persistent, described | _SCALED, constants, architecture, **options)
    assert built.metadata.shared <= SHARED[architecture]


@pytest.mark.parametrize(("rows", "warps"), [(16, 4), (64, 4), (128, 8)])
def test_block_experts(rows, warps):
    """On Hopper: the tensor cores' instructions of a warpgroup, a sum for each group, and one rounding."""
    pointers = {"x": "*fp8e4nv", "w": "*fp8e4nv", "out": "*bf16"}
    pointers |= dict.fromkeys(("x_scale", "w_scale", "weights"), "*fp32")
    pointers |= dict.fromkeys(("rows_ptr", "experts_ptr", "padded_ptr"), "*i32")
    sizes = dict.fromkeys(("valid", "cols", "depth", "stride_x", "stride_we", "stride_w", "stride_out"), "i32")
    sizes |= dict.fromkeys(("stride_xs", "stride_xs_k", "stride_wse", "stride_ws", "together"), "i32")
    constants = {"PER": 8, "WEIGHTED": False, "SORTED": True, "EVEN": True, "SWAP": rows < 64}
    constants |= {"BLOCK_M": rows, "BLOCK_N": 128}
    built = build(block_experts._tile, pointers | sizes, constants, 90, num_warps=warps, num_stages=4)
    assert built.metadata.shared <= SHARED[90]
    made = built.asm["ptx"]
    assert f"wgmma.mma_async.sync.aligned.m64n{rows if rows < 64 else 128}k32" in made and "mma.sync" not in made
    assert "fma.rn.f32" in made and "add.f32" not in made and "add.rn.f32" not in made


@pytest.mark.parametrize("at", ["x", "w", "out", "w_scale"])
def test_block_experts_refuse_other_strides(at):
    """The kernel counts one element from a column to the next. Other strides would give other numbers."""
    held = {"x": (4, 256), "w": (2, 128, 256), "out": (4, 2, 128), "x_scale": (4, 2), "w_scale": (2, 1, 2)}
    held = {name: torch.empty(size) for name, size in held.items()}
    held[at] = torch.empty(held[at].mT.shape).mT if at != "w_scale" else torch.empty(2, 2, 2)[..., 0].unsqueeze(1)
    with pytest.raises(ValueError, match="contiguous along their last dimension"):
        block_experts.products(*held.values(), None, None, None, None, 2, {"BLOCK_SIZE_M": 16}, False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("cols", [128, 4096, 20000])
def test_norm(architecture, cols):
    block, rows, chunks, warps = norm.shape_of(cols)
    pointers = dict.fromkeys(("x", "residual", "weight", "out", "summed"), "*bf16")
    sizes = dict.fromkeys(("rows", "heads", "cols", "stride_row", "stride_head"), "i32")
    constants = {"HAS_RESIDUAL": True, "HAS_WEIGHT": True, "BLOCK": block, "ROWS": rows, "CHUNKS": chunks}
    build(
        norm._rms_norm, pointers | sizes | {"eps": "fp32", "offset": "fp32"}, constants, architecture, num_warps=warps
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_copies_of_e4m3_pages_round_as_the_decode_kernel_does(dtype):
    """On Hopper: exactly to fp32, one product that keeps small numbers, and one rounding."""
    pointers = dict.fromkeys(("k", "v"), "*fp8e4nv") | dict.fromkeys(("keys", "values"), f"*{dtype}")
    pointers |= dict.fromkeys(("table", "lengths", "owners", "bases"), "*i32")
    pointers |= dict.fromkeys(("k_scales", "v_scales"), "*fp32")
    sizes = dict.fromkeys(("table_row", "page_step", "token_step", "head_step", "scale_step", "heads"), "i32")
    constants = {"SIZE": 16, "PAGE": eighths.PAGE, "TOKENS": eighths._TOKENS, "HEAD": 128}
    made = build(eighths._widen, pointers | sizes, constants, 90).asm["ptx"]
    rounds = {"bf16": "cvt.rn.bf16", "fp16": "cvt.rn.f16"}[dtype]
    assert "cvt.rn.f16x2.e4m3x2" in made and "cvt.f32.f16" in made and "mul.f32" in made
    assert f"{rounds}.f32" in made or f"{rounds}x2.f32" in made
    assert "ftz" not in made and "fma" not in made and "satfinite" not in made


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norm_over_ranks(architecture):
    for cols in (512, 3072):
        block, rows, chunks, warps = norm.shape_of(cols)
        constants = {"BLOCK": block, "ROWS": rows, "CHUNKS": chunks}
        numbers = dict.fromkeys(("rows", "cols", "stride_row", "at", "count"), "i32")
        given = {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "sums": "*fp32", "eps": "fp32"} | numbers
        for kernel in (rank_norm._square_sums, rank_norm._norm):
            taken = {name: given[name] for name in kernel.arg_names if name in given}
            build(kernel, taken, constants, architecture, num_warps=warps)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layer_norm(architecture):
    block, rows, _, warps = norm.shape_of(4096)
    pointers = dict.fromkeys(("x", "weight", "bias", "out"), "*bf16")
    sizes = dict.fromkeys(("rows", "cols", "stride_row"), "i32")
    constants = {"HAS_WEIGHT": True, "HAS_BIAS": True, "BLOCK": block, "ROWS": rows}
    build(norm._layer_norm, pointers | sizes | {"eps": "fp32"}, constants, architecture, num_warps=warps)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("head_size", [64, 128])
def test_rope(architecture, head_size):
    pointers = dict.fromkeys(("q", "k", "q_weight", "k_weight", "cache", "q_out", "k_out"), "*bf16")
    sizes = dict.fromkeys(("heads_q", "heads_k", "stride_q", "stride_k", "stride_cache"), "i32")
    signature = {"positions": "*i64"} | pointers | sizes | {"eps": "fp32"}
    constants = {"HALF": head_size // 2, "HEADS": 8, "HAS_NORM": True}
    build(rope._rotate, signature, constants, architecture, num_warps=2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drafts(architecture):
    signature = {"drawn": "*i64", "inputs": "*i32", "edges": "*i32", "tokens": "*i32", "counts": "*i32", "most": "i32"}
    build(drafts._check, signature, {"BLOCK": 8}, architecture, num_warps=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_row_sum(architecture):
    signature = {"x": "*bf16", "out": "*fp32", "rows": "i32", "cols": "i32", "divisor": "fp32"}
    for rows, block in ((1, 2048), (128, 8)):
        build(reduce._row_sum, signature, {"ROWS": rows, "BLOCK": block}, architecture, num_warps=4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_leaves(architecture):
    processors = 132 if leaves.describes(architecture // 10, SHARED[architecture]) else 0
    sizes = [(1, 8, 512), (64, 8, 512), (8192, 8, 512)]
    if architecture == 90:
        sizes += [(17, 4, 512), (128, 2, 512), (256, 8, 64), (8192, 2, 32), (8192, 4, 96), (8192, 1, 128), (1, 1, 32)]
    given = dict.fromkeys(("rows", "cols", "stride_x", "stride_w"), "i32")
    given |= {"bias": "*bf16", "held": "*fp32", "out": "*bf16"}
    forms = {(leaves.form(rows, 4096, size, count, processors), count, size) for rows, count, size in sizes}
    for (groups, described, tile), count, size in sorted(forms):
        loaded = {"x": "*bf16", "w": "*bf16"}
        if described:
            loaded = {"x": f"tensordesc<bf16[{tile.m}, {tile.k}]>", "w": f"tensordesc<bf16[{tile.n}, {tile.k}]>"}
        constants = {"STEPS": size // tile.k, "COUNT": count // max(groups, 1), "HAS_BIAS": False, "GROUP": 8}
        constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
        function = leaves._pairs
        if groups:
            function, constants = leaves._flat, constants | {"DESCRIBED": described}
        taken = {name: kind for name, kind in (given | loaded).items() if name in function.arg_names}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        built = build(function, taken, constants, architecture, **options)
        assert built.metadata.shared <= SHARED[architecture]
        # No addition of leaves is joined with a product, which would be another order.
        added = built.asm["ttir"].count("arith.addf")
        assert added == (constants["COUNT"].bit_length() - 1 if groups else count - 1)
    signature = {"parts": "*fp32", "bias": "*bf16", "out": "*bf16", "count": "i32", "cols": "i32"}
    constants = {"COUNT": 8, "HAS_BIAS": True, "BLOCK": 1024}
    build(leaves._tree, signature, constants, architecture, num_warps=4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rank_sum(architecture):
    signature = {"parts": "*bf16", "out": "*bf16", "n": "i32"}
    build(ranks._rank_sum, signature, {"RANKS": 8, "BLOCK": 1024}, architecture, num_warps=4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pooling(architecture):
    sizes = dict.fromkeys(("rows", "cols", "stride_row"), "i32")
    for rows, block in ((1, 1024), (128, 8)):
        signature = {"x": "*fp32", "out": "*fp32", "eps": "fp32"} | sizes
        build(pooling._l2_normalize, signature, {"ROWS": rows, "BLOCK": block}, architecture, num_warps=4)
    for starts in ("*i32", "*i64"):
        signature = {"x": "*bf16", "starts": starts, "out": "*fp32", "cols": "i32", "stride_row": "i32"}
        build(pooling._mean_rows, signature, {"ROWS": 32, "COLUMNS": 64}, architecture, num_warps=4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("head_size", [64, 128])
def test_attention_backward(architecture, head_size):
    tiles = attention_backward.choose(head_size, 2, SHARED[architecture])
    pointers = dict.fromkeys(("q", "k", "v", "do", "dk", "dv", "dq"), "*bf16") | {"lse2": "*fp32", "delta": "*fp32"}
    constants = {"GROUP": 4, "D": head_size, "WIDTH": head_size, "HAS_CAP": False, "HAS_WINDOW": False}
    for kernel, tile in (
        (attention_backward._for_keys, tiles.for_keys),
        (attention_backward._for_queries, tiles.for_queries),
    ):
        names = kernel.arg_names
        sizes = dict.fromkeys((n for n in names if n.startswith("stride_") or n in ("window", "blocks")), "i32")
        signature = pointers | sizes | {"starts": "*i32", "scale": "fp32", "cap": "fp32"}
        chosen = constants | {"QUERIES": tile.queries, "KEYS": tile.keys, "SPLIT": tile.split, "LEVEL": tile.level}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        built = build(kernel, {n: signature[n] for n in names if n in signature}, chosen, architecture, **options)
        assert built.metadata.shared <= tiles.shared <= SHARED[architecture]


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_gradients_of_rows(architecture):
    cases = (
        (norm_backward._rms_norm, {"BLOCK": 2048, "ROWS": 1}, {"x", "g", "weight", "dx"}, {"parts"}, {"eps", "offset"}),
        (norm_backward._column_sum, {"BLOCK": 64}, set(), {"parts", "out"}, set()),
        (gated_backward._gated, {"KIND": 0, "BLOCK": 1024}, {"g", "gate", "up", "dgate", "dup"}, set(), set()),
        (
            logits_backward._logits,
            {"HAS_CAP": False, "BLOCK": 4096},
            {"scores", "logits", "out"},
            {"g", "temperature"},
            {"cap"},
        ),
        (embedding_backward._embedding, {"BLOCK": 512, "ADD": True}, {"g"}, {"out"}, set()),
        (chains._norms, {"BLOCK": 2048, "ROWS": 1}, {"x", "g"}, {"parts"}, {"eps"}),
        (chains._fold, {"BLOCK": 64}, set(), {"parts", "chain"}, set()),
        (chains._sums, {"BLOCK": 64}, {"grad"}, {"chain"}, set()),
    )
    whole = {"tokens": "*i64", "order": "*i64", "begins": "*i64", "edges": "*i32", "blocks": "*i32"}
    for kernel, constants, halves, singles, scalars in cases:
        kinds = (
            dict.fromkeys(halves, "*bf16") | dict.fromkeys(singles, "*fp32") | dict.fromkeys(scalars, "fp32") | whole
        )
        signature = {n: kinds.get(n, "i32") for n in kernel.arg_names if n not in constants}
        build(kernel, signature, constants, architecture, num_warps=4)


@pytest.mark.parametrize("side", [(576, 576), (49152, 576)])
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_chains_of_products(side, kind):
    size, warps = chains.tile(*side)
    signature = {"grad": f"*{kind}", "x": f"*{kind}", "chain": "*fp32", "edges": "*i32"}
    signature |= dict.fromkeys(("sequences", "n_size", "k_size"), "i32")
    built = build(chains._products, signature, {"N": size, "K": size}, 90, num_warps=warps, num_stages=3)
    assert built.metadata.shared <= SHARED[90]
    assert "wgmma" in built.asm["ptx"]


@pytest.mark.parametrize(
    "architecture,rank,parts", [(80, 64, 1), (89, 256, 16), (90, 8, 16), (90, 256, 1), (120, 16, 1)]
)
def test_lora(architecture, rank, parts):
    numbers = ("rows_ptr", "counts_ptr", "starts_ptr", "slots_ptr")
    sizes = ("M", "x_row", "a_slot", "a_rank", "t_slice", "t_part", "t_row", "y_row")
    common = dict.fromkeys(numbers, "*i32") | dict.fromkeys(sizes, "i32") | {"t_ptr": "*fp32"}
    block_r = max(16, min(rank, 64 if parts > 1 else 128))
    if parts == 1:
        common["t_ptr"] = "*bf16"
    signature = common | {"x_ptr": "*bf16", "a_ptr": "*u64"}
    signature = {name: kind for name, kind in signature.items() if name in lora._shrink.arg_names}
    constants = {"K": 4096, "R": rank, "CHUNK": 256, "PARTS": parts, "SLICES": 3}
    constants |= {"BLOCK_M": 16 if parts > 1 else 64, "BLOCK_R": block_r, "BLOCK_K": lora.BLOCK_K}
    built = build(lora._shrink, signature, constants, architecture, num_warps=4, num_stages=3)
    assert built.metadata.shared <= SHARED[architecture]
    signature = common | {
        "b_ptr": "*u64",
        "y_ptr": "*bf16",
        "at_ptr": "*u64",
        "sizes_ptr": "*i64",
        "b_slots_ptr": "*i64",
    }
    signature = {name: kind for name, kind in signature.items() if name in lora._expand.arg_names}
    constants = {"R": rank, "PARTS": parts, "SLICES": 3, "SAME": False}
    constants |= {"BLOCK_M": 16 if parts > 1 else 64, "BLOCK_N": 128, "BLOCK_R": max(16, min(rank, 64))}
    built = build(lora._expand, signature, constants, architecture, num_warps=4, num_stages=2)
    assert built.metadata.shared <= SHARED[architecture]


@pytest.mark.parametrize(
    "architecture,rank,parts", [(80, 64, 1), (89, 256, 16), (90, 8, 8), (90, 256, 1), (120, 16, 1)]
)
def test_expert_lora(architecture, rank, parts):
    tables = ("rows_ptr", "experts_ptr", "padded_ptr", "mapping_ptr", "slots_ptr", "enabled_ptr")
    weights = ("x_ptr", "y_ptr", "a_ptr", "a2_ptr", "b_ptr", "b2_ptr")
    sizes = ("ROWS", "LENGTH", "BLOCKS", "ACTIVE", "x_row", "y_row", "a_slot", "a_expert", "b_slot", "b_expert")
    kinds = dict.fromkeys(tables, "*i32") | dict.fromkeys(weights, "*bf16") | dict.fromkeys(sizes, "i32")
    kinds |= {"t_ptr": "*bf16" if parts == 1 else "*fp32", "w_ptr": "*fp32"}
    shared = {"R": rank, "PARTS": parts, "TOP_K": 8, "SORTED": parts == 1, "BLOCK_M": expert_lora.BLOCK_M}
    shared |= {"BLOCK_R": max(16, min(rank, 64)), "MOST": 8}
    for kernel, own, stages in (
        (expert_lora._shrink, {"K": 2048, "CHUNK": 256, "PER": 8, "BLOCK_K": expert_lora.BLOCK_K}, 3),
        (
            expert_lora._expand,
            {"N": 768, "WEIGHTED": True, "COLUMNS": 512, "BLOCK_N": expert_lora.BLOCK_N},
            2 if parts == 1 else 1,
        ),
    ):
        signature = {name: kind for name, kind in kinds.items() if name in kernel.arg_names}
        built = build(kernel, signature, shared | own, architecture, num_warps=4, num_stages=stages)
        assert built.metadata.shared <= SHARED[architecture]
