"""Quantized checkpoints on the real CPU engine: axes, accuracy against fp64, a planted fault, and refusals by name."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bi_patch.errors import UnsupportedFeature
from bi_patch.tools.faults import catch, every
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.models import recipes
from bi_patch.tools.verify import precision
from bi_patch.tools.verify.child import ARMED, PATIENT, ChildEngine
from bi_patch.tools.verify.engine import Options
from bi_patch.tools.verify.probes import FEATURE_PROBES, updating

pytestmark = pytest.mark.engine

AXES = ("batch size", "co-batch contents", "chunk budget")


def invariant(engine):
    load = catch.workload(engine)
    for axis in AXES:
        found = list(catch.cases(engine, axis, load))
        assert found and not any(case.differs for case in found), axis
    return load


def accurate(engine, linears):
    found = precision.of(engine)
    assert found.layers == linears and not found.failed and 0 < found.worst < 1, found.words()


def needs_tiles(name):
    if name == recipes.FP8_BLOCKS and not torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM's CPU build needs AMX for FP8 in blocks")


def test_int8_and_a_scale_that_the_batch_shares(start):
    """Three layers of four linears, the head, and a layer's down_proj that stays in bf16."""
    with start(ARMED, recipes.INT8, kind=FaultyEngine, chunk=512, digests=True) as engine:
        load = invariant(engine)
        accurate(engine, 13)
        names = [fault.name for fault in every() if fault.model == recipes.INT8]
        assert names
        for name in names:
            found = catch.catch(engine, name, load)
            print(f"{name}: {found.named}")
            assert found.caught and found.right, found
        if not updating.missing(engine):  # vLLM's kernel for AMX takes no new weights
            cases = list(catch.cases(engine, catch.UPDATE, load))
            assert cases and not [case.label for case in cases if case.differs]


@pytest.mark.parametrize("name", [recipes.AWQ, recipes.GPTQ])
def test_four_bits(start, name):
    with start(ARMED, name, chunk=512) as engine:
        invariant(engine)
        accurate(engine, 13)


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.QUANTIZED)
def test_compiled(start, name):
    needs_tiles(name)
    with start(ARMED, name, chunk=512, eager=False) as engine:
        invariant(engine)


@pytest.mark.slow
@pytest.mark.parametrize("name", [recipes.STATIC, recipes.W4A16, recipes.ZEROS, recipes.FP8_BLOCKS])
def test_further_schemes(start, name):
    needs_tiles(name)
    with start(ARMED, name, chunk=512) as engine:
        invariant(engine)
        accurate(engine, 13)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "environ"),
    [
        (recipes.AWQ, "bfloat16", {"VLLM_CPU_INT4_W4A8": "0"}),  # what machines without AMX run, too
        (recipes.ZEROS, "float16", {}),
        (recipes.W4A16, "float32", {}),  # vLLM has no kernel for it, so the bundled GEMM serves
        (recipes.INT8, "float16", {}),  # vLLM's AMX kernel would end the process
        (recipes.INT8, "float32", {}),
        (recipes.STATIC, "float32", {}),
    ],
)
def test_other_kernels(start, name, dtype, environ):
    with start(ARMED, name, chunk=512, dtype=dtype, environ=environ) as engine:
        invariant(engine)
        accurate(engine, 13)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "eager"),
    [
        *((name, "bfloat16", True) for name in (recipes.INT8, recipes.AWQ, recipes.GPTQ, recipes.W4A16, recipes.ZEROS)),
        *((recipes.INT8, dtype, True) for dtype in ("float16", "float32")),
        *((name, "bfloat16", False) for name in (recipes.INT8, recipes.W4A16)),
        (recipes.W4A16, "float32", True),
    ],
)
def test_new_weights(model, name, dtype, eager):
    probe = next(probe for probe in FEATURE_PROBES if probe.name == catch.UPDATE)
    given = Options(model(name), dtype=dtype, max_model_len=1024, chunk=512, eager=eager)
    environ = PATIENT | os.environ
    with ChildEngine(ARMED, given, environ=environ) as engine:
        load = catch.workload(engine)
        if why := probe.missing(engine):
            pytest.skip(why)
        change, requests = probe.changes(engine)[0], probe.requests(engine, load)
        expected = probe.collect(engine, load)
    with ChildEngine(ARMED, given.but(**change.options), environ=environ) as engine:
        got = probe.collect(engine, load, change)
        invariant(engine)
    cases = list(probe.cases(change, requests, expected, got))
    assert cases and not [f"{case.label}: {case.difference.first}" for case in cases if case.differs]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"group_size": 16}, "awq int4, groups of 16, zero points"),
        ({"version": "gemv"}, "packing 'gemv'"),
        ({"lm_head": True}, "a quantized language-model head"),
    ],
)
def test_what_has_no_kernel_is_refused_before_weights_are_loaded(refusing, model, tmp_path, change, said):
    for file in Path(model(recipes.AWQ)).iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # loading it would be another error
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedFeature, match=f"features: .*{said}"):
        refusing.refuse(Options(str(tmp_path), max_model_len=512))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (recipes.INT8, "model.layers.1.mlp.down_proj.weight_scale", float("nan")),
        (recipes.AWQ, "model.layers.0.self_attn.o_proj.scales", float("inf")),
        (recipes.STATIC, "model.layers.0.mlp.down_proj.input_scale", -1.0),
    ],
)
def test_a_scale_that_gives_no_numbers_is_refused_with_the_name_of_its_tensor(
    refusing_late, model, tmp_path, name, key, value
):
    for file in Path(model(name)).iterdir():
        shutil.copy(file, tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held[key].view(-1)[-1] = value
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedFeature, match=f"quantized.scales: {key} "):
        refusing_late.refuse(Options(str(tmp_path), max_model_len=512))
