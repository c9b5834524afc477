"""Speculative decoding on the real engine: on equals off, bit for bit, for every kind of request."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bi_patch.errors import UnsupportedFeature
from bi_patch.tools.models import adapters, drafts, recipes
from bi_patch.tools.verify.child import EngineFailed

pytestmark = pytest.mark.engine

# Few KV blocks and few tokens a step, so that requests are preempted and prompts come in chunks.
OPTIONS = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 48,
    "num_gpu_blocks_override": 10,
    "disable_log_stats": False,
    "seed": 3,
}


UNFIT = ("longest", "grammars")  # phases in which a made draft model proposes nothing that a grammar takes


def ngram(count, **changes):
    return {
        "method": "ngram",
        "num_speculative_tokens": count,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
        **changes,
    }


@pytest.fixture(scope="module")
def ask(model, cache):
    """ask(name, *phases, **options): what speculation.py prints for an engine of the model `name`, asked once. With
    `first`, further options, it starts another engine before, whose answers are then known, too."""
    known = {}

    def run(name, phases, *engines):
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))} | {
            "BI_PATCH_CACHE": str(cache),
            "BI_PATCH_UNSEEDED": "derive",  # unseeded requests then have the same seeds on every engine
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        script = Path(__file__).with_name("speculation.py")
        done = subprocess.run(
            [sys.executable, str(script), model(name), f"[{', '.join(engines)}]", *phases],
            env=environ,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
        lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        known.update({(name, phases, given): json.loads(x) for given, x in zip(engines, lines, strict=True)})

    def ask(name, *phases, first=None, **options):
        wanted = [json.dumps({**OPTIONS, **given}) for given in (first, options) if given is not None]
        if missing := [given for given in wanted if (name, phases, given) not in known]:
            run(name, phases, *missing)
        return known[name, phases, wanted[-1]]

    return ask


@pytest.fixture(scope="module")
def drafts_of(model, tmp_path_factory):
    """drafts_of(method, count): the speculative_config of a draft model or head for recipes.LLAMA."""

    def make(method, count):
        folder = drafts.write(method, model(recipes.LLAMA), tmp_path_factory.mktemp(method))
        return {"method": method, "model": str(folder), "num_speculative_tokens": count}

    return make


def equal(off, on, without=("longest",)):
    """Both engines gave the same bits, with accepted and rejected drafts in each phase but those of `without`."""
    assert len(off["found"]) > 100 and off["found"].keys() == on["found"].keys()
    wrong = [name for name in off["found"] if off["found"][name] != on["found"][name]]
    assert not wrong, wrong
    for phase, (accepted, drafted, _) in on["counted"].items():
        assert phase in without or 0 < accepted < drafted, (phase, accepted, drafted)
    assert off["counted"]["preempted"][2] > 0 and on["counted"]["preempted"][2] > 0
    assert not any(drafted for _, drafted, _ in off["counted"].values())


def test_on_equals_off(ask):
    """All phases but processed logprobs, which the slow tests have, too."""
    phases = ("together", "together, cached", "late", "preempted", "ends", "longest", "grammars", "raw_logits")
    on = ask(recipes.QWEN3, *phases, first={}, speculative_config=ngram(3))
    equal(ask(recipes.QWEN3, *phases), on)


@pytest.mark.slow
def test_on_equals_off_with_a_models_own_head(ask):
    """One of the phases, so that the test is short."""
    own = {"method": "mtp", "num_speculative_tokens": 2}
    off, on = (ask(recipes.MIMO, "together", **given) for given in ({}, {"speculative_config": own}))
    assert off["found"] == on["found"] and len(on["found"]) > 8
    accepted, drafted, _ = on["counted"]["together"]
    assert 0 < accepted < drafted


@pytest.mark.slow
def test_on_equals_off_with_a_head(ask, drafts_of):
    equal(ask(recipes.LLAMA), ask(recipes.LLAMA, speculative_config=drafts_of("eagle3", 4)), UNFIT)


@pytest.mark.slow
def test_on_equals_off_for_other_numbers_of_drafts_and_models(ask):
    off = ask(recipes.QWEN3)
    for count in (1, 7, 16):
        equal(off, ask(recipes.QWEN3, speculative_config=ngram(count)))
    for name in (recipes.MOE,):
        equal(ask(name), ask(name, speculative_config=ngram(4)))
    compiled = {"dtype": "float32", "enforce_eager": False}
    equal(ask(recipes.QWEN3, **compiled), ask(recipes.QWEN3, speculative_config=ngram(2), **compiled))


@pytest.mark.slow
@pytest.mark.parametrize("library", ["xgrammar", "guidance", "outlines"])
def test_on_equals_off_with_each_grammar_library(ask, library):
    given = {"structured_outputs_config": {"backend": library}}
    off = ask(recipes.QWEN3, "grammars", **given)
    on = ask(recipes.QWEN3, "grammars", speculative_config=ngram(5), **given)
    assert off["found"] == on["found"] and len(on["found"]) == (9 if library == "xgrammar" else 12)
    assert 0 < on["counted"]["grammars"][0] < on["counted"]["grammars"][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [recipes.INT8, recipes.W4A16])
def test_on_equals_off_with_quantized_weights(ask, name):
    equal(ask(name), ask(name, speculative_config=ngram(3)))


@pytest.mark.slow
def test_on_equals_off_beside_adapters(ask, model, tmp_path_factory):
    """More adapters than slots, on linear layers, embeddings and the head."""
    root, base = tmp_path_factory.mktemp("adapters"), model(recipes.LLAMA)
    folders = [str(adapters.write(base, root / f"{i}", seed=i, rank=8, embedded=i > 1)) for i in range(3)]
    given = {"adapters": folders, "enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    equal(ask(recipes.LLAMA, **given), ask(recipes.LLAMA, speculative_config=ngram(2), **given))


@pytest.mark.parametrize(
    "config, said",
    [
        (ngram(3, rejection_sample_method="synthetic", synthetic_acceptance_length=2.0), "another rule of acceptance"),
        (ngram(3, rejection_sample_method="block"), "another rule of acceptance"),
        ({"method": "ngram_gpu", "num_speculative_tokens": 3}, "other drafts than n-grams"),
        (ngram(3, num_speculative_tokens_per_batch_size=[[1, 4, 3], [5, 16, 1]]), "num_speculative_tokens_per_batch"),
    ],
)
def test_other_rules_and_drafts_are_refused_by_name(refusing, config, said):
    with pytest.raises(UnsupportedFeature, match=f"features: .*{said}"):
        refusing.refuse(refusing.options.but(extra={"speculative_config": config}))


def test_a_draft_model_with_another_vocabulary_is_vllms_own_error(refusing, model, tmp_path):
    base = model(recipes.LLAMA)
    folder = drafts.write("draft_model", base, tmp_path / "drafts")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] // 2}))
    asked = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}
    with pytest.raises(EngineFailed, match="same vocabulary size"):
        refusing.refuse(refusing.options.but(model=base, extra={"speculative_config": asked}))
