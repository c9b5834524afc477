"""Which quantization schemes a configuration has, and to which row of the feature table each belongs."""

import copy
from types import SimpleNamespace

import pytest
from packaging.version import Version

from bi_patch.platforms import releases, schemes
from bi_patch.platforms.features import engine, pairs, quantization

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def tensors(weights, rows=None, **more):
    group = {"weights": weights, "input_activations": rows, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **more,
    }


INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "dynamic": False}
NVFP4 = INT4 | {"type": "float", "strategy": "tensor_group", "group_size": 16}
NVFP4_ROWS = NVFP4 | {"dynamic": "local", "scale_dtype": "torch.float8_e4m3fn", "observer": "static_minmax"}
FLOATS = {"format": "nvfp4-pack-quantized"}
W8A8, W4A16 = tensors(INT8, TOKEN), tensors(INT4, format="pack-quantized")
HEAD = "quantized language-model head (other methods)"
CHANNELS = tensors(INT8 | {"type": "float"}, TOKEN | {"type": "float"}, format="float-quantized")


def config(held, method=None, **model):
    hf = SimpleNamespace(**({} if held is None else {"quantization_config": held}))
    method = method or held["quant_method"]
    return SimpleNamespace(
        model_config=SimpleNamespace(**{"quantization": method, "hf_config": hf, "enforce_eager": True} | model)
    )


def rows(held, method=None, **model):
    made = config(held, method, **model)
    return [row.name for row in quantization.QUANTIZATION if row.asked(made)]


@pytest.mark.parametrize(
    ("held", "name"),
    [
        (W8A8, "INT8 weights and activations (compressed-tensors W8A8)"),
        (
            tensors(INT8 | {"strategy": "tensor"}, INT8 | {"strategy": "tensor"}),
            "INT8 weights, static INT8 activations",
        ),
        (AWQ, "AWQ, 4 bits"),
        (GPTQ, "GPTQ, 4 bits"),
        (GPTQ | {"group_size": -1}, "GPTQ, 4 bits"),
        (W4A16, "compressed-tensors W4A16"),
        (GPTQ | {"desc_act": True}, "GPTQ and compressed-tensors with act-order"),
        (tensors(INT4 | {"actorder": "group"}), "GPTQ and compressed-tensors with act-order"),
        (tensors(INT4 | {"actorder": "weight"}), "compressed-tensors W4A16"),
        (tensors(INT4 | {"symmetric": False, "strategy": "channel", "group_size": None}), "compressed-tensors W4A16"),
        (GPTQ | {"bits": 8}, "8-bit weights alone (GPTQ, compressed-tensors W8A16)"),
        (tensors(INT8), "8-bit weights alone (GPTQ, compressed-tensors W8A16)"),
        (FP8, "FP8 in blocks of 128 x 128"),
        (CHANNELS, "FP8 per channel or tensor, activations per token (compressed-tensors)"),
        (
            FP8 | {"weight_block_size": None, "activation_scheme": "static"},
            "FP8 per tensor, static activations (method fp8)",
        ),
        (FP8 | {"weight_block_size": None}, "FP8 per tensor, dynamic activations"),
        (tensors(NVFP4, **FLOATS), "NVFP4 weights alone (compressed-tensors)"),
        (tensors(NVFP4 | {"scale_dtype": "torch.float8_e4m3fn"}, **FLOATS), "NVFP4 weights alone (compressed-tensors)"),
        (tensors(NVFP4, NVFP4_ROWS, **FLOATS), "NVFP4 weights and activations (compressed-tensors)"),
    ],
)
def test_a_scheme_belongs_to_one_row(held, name):
    assert rows(held) == [name]


@pytest.mark.parametrize(
    "held",
    [
        AWQ | {"group_size": 48},
        AWQ | {"bits": 3},
        AWQ | {"zero_point": False},
        GPTQ | {"sym": False},
        AWQ | {"version": "gemv"},
        AWQ | {"new_option": 1},
        {"quant_method": "awq"},
        GPTQ | {"checkpoint_format": "marlin"},
        FP8 | {"weight_block_size": [64, 64]},
        FP8 | {"fmt": "e5m2"},
        FP8 | {"scale_fmt": "e4m3"},
        FP8 | {"scale_fmt": "ue8m0", "weight_block_size": None},
        tensors(INT8, TOKEN | {"symmetric": False}),
        tensors(INT8, TOKEN | {"strategy": "tensor"}),
        tensors(INT8 | {"symmetric": False}, TOKEN),
        tensors(INT4, TOKEN),
        tensors(INT4 | {"dynamic": "local"}),
        tensors(INT4 | {"scale_dtype": "torch.uint8"}),
        tensors(INT8, TOKEN, kv_cache_scheme=INT8),
        tensors(INT8, TOKEN, transform_config={"config_groups": {"a": 1}}),
        tensors(INT8, TOKEN, sparsity_config={"format": "dense"}),
        tensors(INT8, TOKEN, format="marlin-24"),
        tensors(NVFP4, NVFP4, **FLOATS),
        tensors(NVFP4, NVFP4 | {"dynamic": True}, **FLOATS),
        tensors(NVFP4 | {"dynamic": "local"}, NVFP4_ROWS, **FLOATS),
        tensors(NVFP4 | {"dynamic": "local"}, **FLOATS),
        tensors(NVFP4, NVFP4_ROWS | {"group_size": 32}, **FLOATS),
        tensors(NVFP4, NVFP4_ROWS | {"symmetric": False}, **FLOATS),
        tensors(NVFP4, TOKEN | {"type": "float"}, **FLOATS),
        tensors(INT4, NVFP4_ROWS, format="pack-quantized"),
        tensors(INT8, TOKEN | {"dynamic": "local"}),
        tensors(NVFP4, format="pack-quantized"),
        tensors(NVFP4 | {"group_size": 32}, **FLOATS),
        tensors(NVFP4 | {"strategy": "group"}, **FLOATS),
        tensors(NVFP4 | {"symmetric": False}, **FLOATS),
        tensors(NVFP4 | {"scale_dtype": "torch.uint8"}, **FLOATS),
        tensors(INT4, **FLOATS),
        {"quant_method": "torchao", "quant_type": "int4"},
    ],
)
def test_what_no_row_names_is_among_the_others(held):
    assert rows(held) == ["other quantized weights"]


def test_scales_of_powers_of_two_have_a_row_besides_that_of_their_blocks():
    powers = "FP8 blocks with scales of powers of two, in other models"
    assert rows(FP8 | {"scale_fmt": "ue8m0"}) == ["FP8 in blocks of 128 x 128", powers]


def test_each_scheme_of_a_mixed_checkpoint_counts():
    mixed = tensors(INT8, TOKEN)
    mixed["config_groups"]["group_1"] = {"weights": INT4 | {"group_size": 40}, "targets": ["re:.*down_proj"]}
    assert rows(mixed) == ["INT8 weights and activations (compressed-tensors W8A8)", "other quantized weights"]
    unknown = GPTQ | {"dynamic": {"+:.*down.*": {"adapter": {}}}}
    assert rows(unknown) == ["GPTQ, 4 bits", "other quantized weights"]
    ruled = GPTQ | {"dynamic": {"-:.*gate.*": {}, r"+:.*\.1\..*": {"bits": 8}}}
    assert rows(ruled) == ["GPTQ, 4 bits", "8-bit weights alone (GPTQ, compressed-tensors W8A16)"]


def _vllm_quantizes(held, name):
    """Whether vLLM itself finds a group of compressed-tensors for a head of this name."""
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    made = compressed_tensors.CompressedTensorsConfig.from_config(copy.deepcopy(held))
    return made.get_scheme_dict(object.__new__(ParallelLMHead), name) is not None


@pytest.mark.parametrize(
    ("targets", "ignore", "head"),
    [
        (["Linear"], [], False),
        (["Linear", "lm_head"], [], True),
        (["re:.*proj"], [], False),
        (["re:.*"], ["lm_head"], False),
        (["re:.*"], ["re:.*lm_head$"], False),
        (["re:.*"], ["re:.*mlp.*"], True),
        (["re:.*proj", "re:.*head$"], [], True),
        (["re:.*Head"], [], True),
        (["re:.*"], ["model.lm_head"], True),
        (["re:.*"], ["mtp.lm_head", "xlm_head"], True),
        (["re:.*"], ["re:head"], True),
        (["re:.*"], ["re:lm"], False),
    ],
)
def test_an_expression_may_name_the_head(targets, ignore, head):
    """vLLM quantizes a head that an expression of compressed-tensors names."""
    held = tensors(INT4, format="pack-quantized") | {"ignore": ignore}
    held["config_groups"]["group_0"]["targets"] = targets
    assert _vllm_quantizes(held, "lm_head") is head
    named = [HEAD] if head else []
    assert rows(held) == ["compressed-tensors W4A16", *named]


@pytest.mark.parametrize(
    ("targets", "ignore", "head"),
    [
        (["re:language_model.*"], [], True),
        (["re:.*"], ["lm_head"], True),
        (["re:.*"], ["language_model.lm_head"], True),  # some models of images name their head as language models do
        (["re:.*"], ["re:.*lm_head"], False),
        (["Linear"], [], False),
    ],
)
def test_a_head_inside_of_another_model_has_a_prefix(targets, ignore, head):
    held = tensors(INT4, format="pack-quantized") | {"ignore": ignore}
    held["config_groups"]["group_0"]["targets"] = targets
    inside = {"hf_text_config": SimpleNamespace()}
    assert (HEAD in rows(held, **inside)) is head
    assert head or not _vllm_quantizes(held, "language_model.lm_head")


def test_an_expression_that_nobody_reads_is_refused():
    held = tensors(INT4, format="pack-quantized")
    held["config_groups"]["group_0"]["targets"] = ["re:*head"]
    assert rows(held) == ["other quantized weights"]


# What a row says of another row's scheme. That row refuses the scheme.
BESIDE = (
    "quantized weights of a checkpoint, compiled",
    "quantized weights or experts in another scheme, compiled",
    "quantized weights in fp16 or fp32",
)


def test_older_releases_refuse_every_scheme_on_cuda():
    for row in quantization.QUANTIZATION:
        for release in releases.BY_PLATFORM["cuda"][:-1]:
            assert row.name in BESIDE or row.cell("cuda", Version(release)).state == "refused", (row.name, release)


def test_experts_and_heads_have_rows_of_their_own():
    zeros = "experts of 4 bits in groups with zero points (AWQ, compressed-tensors)"
    assert rows(AWQ, is_moe=True) == ["AWQ, 4 bits", zeros]
    asymmetric = tensors(INT4 | {"symmetric": False}, format="pack-quantized")
    assert rows(asymmetric, is_moe=True) == ["compressed-tensors W4A16", zeros]
    eight = "experts of 8 bits in groups, weights alone (GPTQ, compressed-tensors)"
    assert rows(GPTQ | {"bits": 8}, is_moe=True)[1:] == [eight]
    assert rows(tensors(INT8), is_moe=True)[1:] == ["quantized experts"]
    channels = "experts in FP8 per channel, activations per token (compressed-tensors, as GLM-4.6)"
    assert rows(CHANNELS, is_moe=True)[1:] == [channels]
    for scheme in ("static", "dynamic"):
        held = FP8 | {"weight_block_size": None, "activation_scheme": scheme}
        assert rows(held, is_moe=True)[1:] == ["experts in FP8 with one scale each (method fp8)"]
    static = tensors(*[INT8 | {"type": "float", "strategy": "tensor"}] * 2, format="float-quantized")
    assert rows(static, is_moe=True)[1:] == ["experts in FP8 with one scale each (other methods)"]
    tokens = tensors(
        INT8 | {"type": "float", "strategy": "tensor"}, TOKEN | {"type": "float"}, format="float-quantized"
    )
    assert rows(tokens, is_moe=True)[1:] == ["experts in FP8 with one scale each (other methods)"]
    assert rows(None, "fp8", is_moe=True)[1:] == ["experts in FP8 made while loading, otherwise"]
    assert rows(W8A8, is_moe=True)[1:] == ["quantized experts"]
    mixed = tensors(INT8 | {"type": "float"}, TOKEN | {"type": "float"}, format="float-quantized")
    mixed["config_groups"]["group_1"] = {"weights": INT4, "targets": ["re:.*experts.*"], "format": "pack-quantized"}
    assert "quantized experts" in rows(mixed, is_moe=True)
    four = "experts of 4 bits in groups (GPTQ, compressed-tensors W4A16)"
    assert rows(W4A16, is_moe=True) == ["compressed-tensors W4A16", four]
    assert rows(GPTQ, is_moe=True) == ["GPTQ, 4 bits", four]
    assert rows(GPTQ | {"group_size": -1}, is_moe=True) == ["GPTQ, 4 bits", "quantized experts"]
    assert "quantized experts" in rows(GPTQ | {"sym": False}, is_moe=True)
    tools = "(compressed-tensors, ModelOpt)"
    for four in (tensors(NVFP4, **FLOATS), MODELOPT | {"quant_algo": "W4A16_NVFP4"}):
        assert rows(four, is_moe=True)[1:] == [f"experts in NVFP4, weights alone {tools}"]
    for four in (tensors(NVFP4, NVFP4_ROWS, **FLOATS), MODELOPT | {"quant_algo": "NVFP4"}):
        assert rows(four, is_moe=True)[1:] == [f"experts in NVFP4, weights and activations {tools}"]
    assert rows(quark([OF_GROUPS, OF_ALL], [OF_ROWS, OF_ALL]), is_moe=True)[1:] == ["quantized experts"]
    for held, ran in ((tensors(NVFP4, **FLOATS), True), (tensors(NVFP4, NVFP4_ROWS, **FLOATS), True)):
        assert (BESIDE[1] in rows(held, is_moe=True, enforce_eager=False)) != ran  # compiled
    assert rows(GPTQ | {"lm_head": True}) == ["GPTQ, 4 bits", "quantized language-model head (GPTQ)"]
    assert rows(AWQ | {"lm_head": True}) == ["AWQ, 4 bits", "quantized language-model head (other methods)"]


def test_minimax_m2_names_the_type_of_its_blocks_otherwise():
    assert rows(FP8 | {"fmt": "float8_e4m3fn"}) == ["FP8 in blocks of 128 x 128"]


ROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
    "autoround_version": "0.9.0",
    "iters": 200,
}
STATIC = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True}
PER_CHANNEL = STATIC | {"qscheme": "per_channel", "ch_axis": 0}
PER_TOKEN = STATIC | {"qscheme": "per_channel", "is_dynamic": True, "ch_axis": 1}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "producer": {"name": "modelopt"}}


def quark(weight, rows, **more):
    group = {"weight": weight, "input_tensors": rows, "output_tensors": None, "bias": None}
    held = {"quant_method": "quark", "global_quant_config": group, "layer_quant_config": {}, "exclude": ["lm_head"]}
    return held | {"export": {"kv_cache_group": [], "pack_method": "reorder"}, "quant_mode": "eager_mode"} | more


INC_ROW, INC_MORE = "AutoRound (INC), 4 bits in the packing of GPTQ", "AutoRound (INC), 8 bits or in the packing of AWQ"
OPT_ROW = "ModelOpt: FP8 per tensor, static activations"
OPT_MORE, OPT_ALONE = "ModelOpt: FP8 per channel or in blocks", "ModelOpt: NVFP4 weights alone"
OPT_FOUR, QUARK_FOUR = (f"{tool}: NVFP4 weights and activations" for tool in ("ModelOpt", "Quark"))
GROUPS = {"config_groups": {"group_0": {"weights": {"group_size": 16}, "targets": ["Linear"]}}}
ROUNDED = {"config_groups": {"group_0": GROUPS["config_groups"]["group_0"] | {"input_activations": {"group_size": 16}}}}
SOME_ROUNDED = {"config_groups": ROUNDED["config_groups"] | {"group_1": GROUPS["config_groups"]["group_0"]}}
OF_GROUPS = {"dtype": "fp4", "qscheme": "per_group", "group_size": 16, "is_dynamic": False, "symmetric": True}
OF_ROWS, OF_ALL = OF_GROUPS | {"is_dynamic": True}, STATIC | {"group_size": None}
QUARK_ROW, QUARK_MORE = "Quark: FP8 per tensor, static activations", "Quark: FP8 per channel"


@pytest.mark.parametrize(
    ("held", "method", "name"),
    [
        (ROUND, "inc", INC_ROW),
        (ROUND | {"bits": 8}, "inc", INC_MORE),
        (ROUND | {"sym": False, "packing_format": "auto_round:auto_awq"}, "inc", INC_MORE),
        (ROUND | {"extra_config": {"model.layers.0.mlp.down_proj": {"bits": 16}}}, "inc", INC_ROW),
        (MODELOPT, "modelopt", OPT_ROW),
        (MODELOPT | {"quant_algo": "fp8_pb_wo"}, "modelopt", OPT_MORE),
        (MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "modelopt", OPT_MORE),
        (MODELOPT | {"quant_algo": "W4A16_NVFP4", "group_size": 16}, "modelopt_fp4", OPT_ALONE),
        (MODELOPT | {"quant_algo": "NVFP4"}, "modelopt_fp4", OPT_FOUR),
        (MODELOPT | ROUNDED | {"quant_algo": "nvfp4", "group_size": 16}, "modelopt_fp4", OPT_FOUR),
        (MODELOPT | GROUPS | {"quant_algo": "NVFP4"}, "modelopt_fp4", OPT_ALONE),  # weights alone, as vLLM reads it
        (MODELOPT | SOME_ROUNDED | {"quant_algo": "NVFP4"}, "modelopt_fp4", OPT_FOUR),
        (
            {
                "quant_method": "modelopt",
                "producer": {"name": "modelopt"},
                "quantization": {
                    "quant_algo": "NVFP4",
                    "kv_cache_quant_algo": "FP8",
                    "group_size": 16,
                    "exclude_modules": ["lm_head"],
                },
            },
            "modelopt_fp4",
            OPT_FOUR,
        ),
        (
            {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
            "modelopt",
            OPT_ROW,
        ),
        (
            MODELOPT
            | {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a.q_proj": {"quant_algo": "FP8"}, "a.up_proj": {"quant_algo": "W4A16_NVFP4"}},
            },
            "modelopt_mixed",
            (OPT_ROW, OPT_ALONE),
        ),
        (
            MODELOPT
            | {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a.q_proj": {"quant_algo": "FP8"}, "a.up_proj": {"quant_algo": "NVFP4"}},
            },
            "modelopt_mixed",
            (OPT_ROW, OPT_FOUR),
        ),
        (quark([OF_GROUPS, OF_ALL], [OF_ROWS, OF_ALL]), "quark", QUARK_FOUR),
        (quark(STATIC, STATIC), "quark", QUARK_ROW),
        (quark(PER_CHANNEL, STATIC), "quark", QUARK_MORE),
        (quark(PER_CHANNEL, PER_TOKEN), "quark", QUARK_MORE),
    ],
)
def test_checkpoints_of_other_tools_have_rows_of_their_own(held, method, name):
    names = (name,) if isinstance(name, str) else name
    assert rows(held, method) == list(names)
    for row in (row for row in quantization.QUANTIZATION if row.name in names):
        cells = row.cell("cpu"), row.cell("ascend"), row.cell("cuda", Version("0.32.0"))
        assert {cell.state for cell in cells} == {"refused"}
        measured = row.name in (INC_ROW, OPT_ROW, OPT_ALONE, OPT_FOUR, QUARK_ROW, QUARK_FOUR)
        assert row.cell("cuda", Version("0.33.0")).state == ("served" if measured else "untried")


@pytest.mark.parametrize(
    ("held", "method"),
    [
        (ROUND | {"bits": 2}, "inc"),
        (ROUND | {"sym": False}, "inc"),
        (ROUND | {"packing_format": "auto_round:auto_awq"}, "inc"),
        (ROUND | {"data_type": "mx_fp"}, "inc"),
        (ROUND | {"backend": "gptq"}, "inc"),
        (ROUND | {"act_bits": 8}, "inc"),
        (ROUND | {"extra_config": {"lm_head": {"bits": 3}}}, "inc"),
        (ROUND | {"rotation": True}, "inc"),
        (MODELOPT | {"quant_algo": "NVFP4", "group_size": 32}, "modelopt"),
        (MODELOPT | {"quant_algo": "NVFP4", "config_groups": {"a": {"weights": {"group_size": 32}}}}, "modelopt"),
        (MODELOPT | {"quant_algo": "NVFP4_AWQ"}, "modelopt"),
        (MODELOPT | {"quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4"}, "modelopt"),
        (MODELOPT | {"quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "modelopt"),
        (MODELOPT | {"quant_algo": "MXFP8"}, "modelopt"),
        (MODELOPT | {"quant_algo": "MIXED_PRECISION"}, "modelopt_mixed"),
        (MODELOPT | {"quant_algo": "W4A16_NVFP4", "group_size": 32}, "modelopt"),
        (MODELOPT | {"has_zero_point": True}, "modelopt"),
        (MODELOPT | {"new_option": 1}, "modelopt"),
        (quark(STATIC, STATIC | {"is_dynamic": True}), "quark"),  # one scale for a batch
        (quark(STATIC, PER_TOKEN), "quark"),
        (quark(STATIC | {"dtype": "int8"}, STATIC | {"dtype": "int8"}), "quark"),
        (quark(STATIC, STATIC, layer_type_quant_config={"Linear": {}}), "quark"),
        (quark(STATIC, STATIC, layer_quant_config={"*k_proj": {"weight": PER_TOKEN, "input_tensors": None}}), "quark"),
        (quark(STATIC, None), "quark"),
        (quark([OF_GROUPS, OF_ALL], None), "quark"),
        (quark([OF_GROUPS, OF_ALL], [OF_GROUPS, OF_ALL]), "quark"),
        (quark([OF_GROUPS | {"group_size": 32}, OF_ALL], [OF_ROWS, OF_ALL]), "quark"),
        (quark([OF_GROUPS, OF_ALL], [OF_ROWS, OF_ALL | {"new_option": 1}]), "quark"),
        (quark([OF_GROUPS], [OF_ROWS]), "quark"),
        (quark(STATIC, [OF_ROWS, OF_ALL]), "quark"),
    ],
)
def test_what_lands_on_no_certified_layer_is_refused(held, method):
    assert "other quantized weights" in rows(held, method)


@pytest.mark.parametrize("name", ["lm_head", ".*head", "head"])
def test_autoround_may_name_the_head_by_an_expression(name):
    held = ROUND | {"extra_config": {name: {"bits": 4}}}
    assert rows(held, "inc") == [INC_ROW, HEAD]


@pytest.mark.parametrize(
    ("blocks", "head"),
    [
        ({"block_name_to_quantize": "model.layers,lm_head"}, True),
        ({"to_quant_block_names": ["lm"]}, True),
        ({"block_name_to_quantize": ""}, True),
        ({"block_name_to_quantize": "model.layers"}, False),
        ({"block_name_to_quantize": None, "to_quant_block_names": ["lm_head"]}, False),
    ],
)
def test_autorounds_blocks_may_hold_the_head(blocks, head):
    """vLLM compares the beginning of a head's name with the blocks' names."""
    assert rows(ROUND | blocks, "inc") == [INC_ROW, *([HEAD] if head else [])]


@pytest.mark.parametrize("ignored", [{"ignore": []}, {"ignore": ["*.gate"]}, {"ignore": None}])
def test_modelopts_algorithm_for_all_layers_is_that_of_the_head(ignored):
    assert rows(MODELOPT | ignored, "modelopt") == [OPT_ROW, HEAD]
    assert rows(MODELOPT | {"ignore": ["*lm_head*"]}, "modelopt") == [OPT_ROW]


@pytest.mark.parametrize(
    ("ignored", "head"),
    [
        ({"ignore": ["mtp.lm_head"]}, True),
        ({"ignore": ["lm_head.*"]}, True),
        ({"ignore": ["lm*"]}, False),
        ({"ignore": ["head"]}, False),
        ({"ignore": [], "exclude_modules": ["lm_head"]}, True),
    ],
)
def test_modelopts_list_leaves_out_a_part_of_a_name_or_a_wildcard(ignored, head):
    from vllm.model_executor.layers.quantization import modelopt

    made = modelopt.ModelOptFp8Config.from_config(MODELOPT | ignored)
    assert made.is_layer_excluded("lm_head") is not head
    assert rows(MODELOPT | ignored, "modelopt") == [OPT_ROW, *([HEAD] if head else [])]


@pytest.mark.parametrize(
    ("name", "ignored", "head"),
    [
        ("lm_head", [], True),
        ("lm_head.weight", [], True),
        ("lm_head", ["lm_head"], False),
        ("lm_headless", [], False),
    ],
)
def test_modelopts_layers_may_name_the_head(name, ignored, head):
    held = MODELOPT | {"ignore": ignored, "quant_algo": "MIXED_PRECISION"}
    held["quantized_layers"] = {name: {"quant_algo": "FP8"}}
    assert rows(held, "modelopt_mixed") == [OPT_ROW, *([HEAD] if head else [])]


def test_modelopts_kv_cache_counts():
    for held in (
        MODELOPT | {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}},
        {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}},
    ):
        assert schemes.caches(config(held, "modelopt"))
    assert not schemes.caches(config(MODELOPT, "modelopt"))


def test_other_types_than_bf16_have_a_row():
    assert rows(AWQ, dtype="torch.bfloat16") == ["AWQ, 4 bits"]
    assert rows(AWQ, dtype="torch.float16") == ["AWQ, 4 bits", "quantized weights in fp16 or fp32"]


def test_a_language_model_inside_of_another_model_leaves_its_schemes_to_that_one():
    inner = config(AWQ)
    assert schemes.of(inner)
    inner.model_config.is_submodel_config = True
    assert schemes.of(inner) == ()


CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_a_checkpoint_may_ask_for_an_fp8_kv_cache_with_static_scales(strategy):
    cache = CACHE | {"strategy": strategy}
    held = tensors(INT8, TOKEN, kv_cache_scheme=cache)
    assert rows(held) == rows(W8A8) and schemes.caches(config(held)) and not schemes.caches(config(W8A8))
    for change in (
        {"strategy": "token"},
        {"strategy": "channel"},
        {"dynamic": True},
        {"num_bits": 4},
        {"type": "int"},
        {"symmetric": False},
        {"dynamic": "local"},
        {"block_structure": [8, 8], "new": 1},
    ):
        assert rows(tensors(INT8, TOKEN, kv_cache_scheme=cache | change)) == ["other quantized weights"], change
    made = config(held)
    made.cache_config = SimpleNamespace(cache_dtype="auto")
    cache = next(row for row in engine.FEATURES if row.name.startswith("FP8 KV cache"))
    assert cache.asked(made) == "the checkpoint's FP8 KV cache"
    assert "--kv-cache-dtype bfloat16" in cache.cell("cpu").todo  # "auto" is what the checkpoint chooses for
    made.cache_config.cache_dtype = "bfloat16"
    assert not cache.asked(made)


def test_without_mla_an_fp8_kv_cache_is_served_beside_some_schemes_only():
    held = {row.name: row for row in pairs.PAIRS if row.name.startswith("an FP8 KV cache with")}
    (channels,) = (row for name, row in held.items() if name.endswith("FP8 weights per channel"))
    (blocks,) = (row for name, row in held.items() if name.endswith("128 x 128 in dense models"))
    (others,) = (row for name, row in held.items() if "other quantized weights" in name)
    static = tensors(INT8 | {"type": "float"}, INT8 | {"type": "float", "strategy": "tensor"}, format="float-quantized")
    for checkpoint, served in ((CHANNELS, True), (static, False), (W8A8, False), (W4A16, False)):
        made = config(checkpoint | {"kv_cache_scheme": CACHE})
        made.cache_config = SimpleNamespace(cache_dtype="auto")
        made.lora_config = made.speculative_config = None
        assert bool(channels.asked(made)) == served, checkpoint
        assert bool(others.asked(made)) != served, checkpoint
        assert not blocks.asked(made), checkpoint
    for experts in (False, True):
        made = config(FP8, is_moe=experts)
        made.cache_config = SimpleNamespace(cache_dtype="fp8")
        made.lora_config = made.speculative_config = None
        assert bool(blocks.asked(made)) != experts and bool(others.asked(made)) == experts
        assert not channels.asked(made)
    (fours,) = (row for name, row in held.items() if name.endswith("NVFP4 weights in dense models"))
    modelopt = MODELOPT | {"quant_algo": "NVFP4", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
    mixed = modelopt | {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "NVFP4"}}}
    both = mixed | {"quantized_layers": mixed["quantized_layers"] | {"b": {"quant_algo": "FP8"}}}
    for checkpoint, served, more in (
        (tensors(NVFP4, **FLOATS, kv_cache_scheme=CACHE), True, {}),
        (tensors(NVFP4, NVFP4_ROWS, **FLOATS, kv_cache_scheme=CACHE), True, {}),
        (modelopt, True, {}),
        (mixed, True, {}),
        (both, False, {}),
        (modelopt, False, {"is_moe": True}),
        (modelopt, False, {"use_mla": True}),
        (modelopt | {"new_option": 1}, False, {}),
    ):
        made = config(checkpoint, **more)
        made.cache_config = SimpleNamespace(cache_dtype="auto")
        made.lora_config = made.speculative_config = None
        assert bool(fours.asked(made)) == served and bool(others.asked(made)) != served, checkpoint
    assert [fours.cell("cuda", Version(of)).state for of in ("0.32.0", "0.33.0")] == ["refused", "served"]
    (graphs,) = (row for name, row in held.items() if name.endswith("NVFP4 weights in dense models, compiled"))
    for checkpoint, eager, untried in (
        (modelopt, True, False),
        (modelopt, False, True),
        (FP8, False, True),
        (CHANNELS, False, False),
    ):
        made = config(checkpoint, enforce_eager=eager)
        made.cache_config = SimpleNamespace(cache_dtype="fp8")
        assert bool(graphs.asked(made)) == untried


class Spec:
    """A stand-in of vLLM's QuantSpec, whose words name the weight's quantization."""

    def __init__(self, name, activation=None):
        self.name, self.activation = name, activation

    def __str__(self):
        return self.name


@pytest.mark.parametrize("named", ["fp8_per_channel", "fp8_per_block"])
def test_a_name_of_online_quantization_is_known_if_nothing_changes_it(named):
    spec = Spec(f"{named}_static")
    plain = {"linear": spec, "moe": spec, "ignore": [], "targets": None}
    (row,) = rows(None, named, quantization_config=SimpleNamespace(**plain))
    assert row.startswith("FP8 made while loading, ") and row.endswith(f"(--quantization {named})")
    for change in (
        {"ignore": ["re:.*q_proj"]},
        {"targets": {"*": named}},
        {"moe": None},
        {"linear": Spec(f"{named}_static", "fp8_per_token")},
        {"linear": Spec("mxfp8")},
    ):
        assert rows(None, named, quantization_config=SimpleNamespace(**plain | change)) == ["other quantized weights"]
    assert rows(AWQ, named, quantization_config=SimpleNamespace(**plain)) == ["other quantized weights"]


def test_gpt_oss_as_published_has_a_row_with_its_reason():
    held = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    for method in ("mxfp4", "gpt_oss_mxfp4"):
        assert rows(held, method, is_moe=True) == ["MXFP4 (gpt-oss as published)", "experts in MXFP4"]
    assert rows(held | {"block_size": 16}, "mxfp4") == ["other quantized weights"]


_BY_WNA16 = "experts of AWQ and GPTQ by --quantization moe_wna16"


@pytest.mark.parametrize(
    ("held", "linears", "experts"),
    [
        (AWQ, "AWQ, 4 bits", "experts of 4 bits in groups with zero points (AWQ, compressed-tensors)"),
        (GPTQ, "GPTQ, 4 bits", "experts of 4 bits in groups (GPTQ, compressed-tensors W4A16)"),
        (
            GPTQ | {"bits": 8},
            "8-bit weights alone (GPTQ, compressed-tensors W8A16)",
            "experts of 8 bits in groups, weights alone (GPTQ, compressed-tensors)",
        ),
        (GPTQ | {"dynamic": {"-:.*mlp.gate$": {}}}, "GPTQ, 4 bits", None),
    ],
)
def test_experts_that_a_user_names_another_method_for_have_a_row_of_their_own(held, linears, experts):
    assert rows(held, "moe_wna16") == [linears, _BY_WNA16]
    if experts:
        assert rows(held, "moe_wna16", is_moe=True) == [linears, experts, _BY_WNA16]
    for refused in ({"lm_head": True}, {"dynamic": {"+:.*down.*": {"bits": 8}}}, {"sym": False, "bits": 4}):
        assert "other quantized weights" in rows(GPTQ | refused, "moe_wna16")
    (row,) = (row for row in quantization.QUANTIZATION if row.name == _BY_WNA16)
    assert row.cell("cuda").state == "served" and row.cell("cpu").state == "refused"
    assert row.cell("cuda", Version("0.32.0")).state == "refused"


def test_a_method_must_be_the_checkpoints():
    assert rows(AWQ, "awq_marlin") == rows(AWQ, "auto_awq") == ["AWQ, 4 bits"]
    for made in (
        rows(AWQ, "gptq"),
        rows(FP8, "moe_wna16"),
        rows(None, "awq"),
        rows(AWQ, quantization_config=object()),
    ):
        assert made == ["other quantized weights"]
    assert rows(None, "fp8") == ["FP8 made while loading (--quantization fp8)"]
    assert schemes.of(SimpleNamespace(model_config=None)) == ()


def test_a_scheme_says_what_it_is():
    (scheme,) = schemes.of(config(GPTQ | {"desc_act": True, "lm_head": True}))
    assert str(scheme) == "gptq int4, groups of 128, act-order, a quantized head"
    (scheme,) = schemes.of(config(W8A8))
    assert str(scheme) == "compressed-tensors int8, scales per channel, int8 activations per token"
    (scheme,) = schemes.of(config({"quant_method": "awq"}))
    assert "cannot be read" in str(scheme)


# The methods of vLLM that a row of their own may serve. All others are refused, as is one that nobody knows yet.
_SERVED = {"awq", "awq_marlin", "auto_awq", "gptq", "gptq_marlin", "auto_gptq", "fp8", "compressed-tensors"}
_OSS = {"mxfp4", "gpt_oss_mxfp4"}  # served on CUDA
# Methods that older releases had.
_FORMER = {"gguf", "bitsandbytes", "ptpc_fp8", "petit_nvfp4", "a method of tomorrow"}


def _methods():
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    return set(QUANTIZATION_METHODS) | _FORMER


@pytest.mark.parametrize("platform", ["cpu", "cuda", "ascend"])
def test_every_method_of_vllms_registry_is_refused_unless_a_row_serves_it(platform):
    methods = _methods()
    assert methods >= _SERVED  # a name that vLLM dropped has no row left to keep
    for method in methods - _SERVED:
        known = platform == "cuda" and method in _OSS
        for held in ({"quant_method": method}, {"quant_method": method, **AWQ_LIKE}, None)[known:]:
            made = config(held, method)
            asked = [row for row in quantization.QUANTIZATION if row.asked(made)]
            for release in map(Version, releases.BY_PLATFORM[platform]):
                states = {row.cell(platform, release).state for row in asked}
                assert "refused" in states, f"{method} with {held} would start on {platform}, vLLM {release}"


def test_gpt_oss_as_published_starts_on_cuda_in_the_release_of_its_run_only():
    for method in sorted(_OSS):
        asked = [row for row in quantization.QUANTIZATION if row.asked(config({"quant_method": method}, is_moe=True))]
        assert len(asked) == 2
        for release in map(Version, releases.BY_PLATFORM["cuda"]):
            states = {row.cell("cuda", release).state for row in asked}
            assert states == ({"served"} if release >= Version("0.33") else {"refused"}), release


@pytest.mark.parametrize("method", sorted(_SERVED))
def test_a_method_without_a_description_is_refused_except_fp8(method):
    made = rows(None, method)
    assert made == (["FP8 made while loading (--quantization fp8)"] if method == "fp8" else ["other quantized weights"])


AWQ_LIKE = {"bits": 4, "group_size": 128, "zero_point": True, "sym": True, "desc_act": False}
