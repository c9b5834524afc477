"""vLLM's own Triton attention with a window or ALiBi, prefill against decode: without the seams and with them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from bi_patch import installed

if importlib.util.find_spec("triton") is None or importlib.util.find_spec("vllm") is None:
    pytest.skip("triton or vllm is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def differing() -> dict[tuple[str, str], tuple[int, int]]:
    """By case and form: how many rows differ, and how many rows there are."""
    script = Path(__file__).with_name("vllm_attention.py")
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True, timeout=900)
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("DIFFERING")]
    assert len(found) == 4, done.stderr[-3000:]
    return {(case, form): (int(rows), int(all_rows)) for case, form, rows, all_rows in found}


@pytest.mark.skipif(installed.find("cpu").release >= Version("0.33"), reason="vLLM has this step itself from 0.33 on")
def test_without_the_seam_rows_after_a_masked_tile_differ(differing):
    assert differing["window", "stock"][0] > 3


def test_without_the_seam_rows_with_alibi_differ(differing):
    assert differing["alibi", "stock"][0] > 3


@pytest.mark.parametrize("case", ["window", "alibi"])
def test_with_the_seams_none_does(differing, case):
    assert differing[case, "closed"] == (0, 37)


def test_it_compiles_for_every_gpu_from_ampere_on():
    """vLLM's Triton attention, with the seams, serves GPUs other than Hopper. It fits into their shared memory."""
    script = Path(__file__).with_name("compile_attention.py")
    capabilities = ("80", "86", "89", "90", "100", "120")
    command = [sys.executable, "-W", "ignore", script, *capabilities]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    made = [line.split() for line in done.stdout.splitlines() if line.startswith("COMPILED")]
    assert len(made) == 5 * len(capabilities), done.stderr[-3000:]
    assert max(int(line[-1]) for line in made) <= 101376  # the smallest of these GPUs


def test_latents_of_8_bits_have_one_order_in_every_batch():
    """vLLM's Triton-MLA kernel in a fixed number of parts, on e4m3 latents."""
    script = Path(__file__).with_name("vllm_latent.py")
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True, timeout=900)
    made = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("LATENT")]
    assert len(made) == 1, done.stderr[-3000:]
    differing, rows, error, finite = made[0]
    assert (int(differing), int(rows), finite) == (0, 16, "True")
    assert float(error) < 2e-3
