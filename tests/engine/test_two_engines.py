"""Two compiled engines in one process, with equal configurations and other weights: each computes with its own."""

import json
import os
import subprocess
import sys

import pytest

from bi_patch.tools.models import recipes
from bi_patch.tools.verify.child import ARMED, PATIENT, child_environ
from bi_patch.tools.verify.engine import Options

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# Starts an engine for each seed. All engines live to the end. Prints their answers, how many routes the library serves
# (in compiled code, these routes are operators), and how many engines loaded compiled code from vLLM's cache. vLLM 0.32
# keeps this code, fails to load it, and compiles again. So the script loads it as vLLM does with its own backend.
SCRIPT = """
import bi_patch
import json, os, sys
import torch
from bi_patch.ops.cpu import linear
from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.engine import LocalEngine, Options

linear.serving = lambda certificate: frozenset(linear.ROWS if sys.argv[2] == "library" else ())
linear._certify = None  # the tested routes compare nothing
certificate = type("", (), {"passed_rows": list(linear.ROWS)})
linear.certify.certify_linear = lambda *_: certificate
loaded = []


def load(model, path):
    if not os.path.exists(path):
        return None
    with decorators.set_current_vllm_config(model.vllm_config), open(path, "rb") as file:
        loaded.append(torch.compiler.load_compiled_function(file, f_globals=model.forward.__globals__))
    loaded[-1].disable_guard_check()
    return loaded[-1]


from vllm.compilation import decorators

decorators._try_load_aot_compiled_fn = load
engines = [
    LocalEngine(Options(sys.argv[1], eager=False, max_model_len=256, chunk=256, random_weights=int(seed)))
    for seed in sys.argv[3:]
]
requests = [Request(tuple((7 * i + j) % 1900 for j in range(n)), max_tokens=8) for i, n in enumerate((5, 64, 90))]
answers = [[[a.tokens, a.logprobs] for a in engine.generate(requests)] for engine in engines * 2]
print("RESULT", json.dumps([answers, sum(bool(held.vendor_rows) for held in linear._layers.values()), len(loaded)]))
"""


def answers(model, tmp_path, serves, *seeds):
    own = {"VLLM_CACHE_ROOT": str(tmp_path), "PYTHONPATH": os.pathsep.join((".", os.environ["PYTHONPATH"]))}
    environ = child_environ(os.environ | PATIENT, ARMED, Options(model, eager=False)) | own
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, serves, *map(str, seeds)], env=environ, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    found, operators, loaded = json.loads(lines[-1].removeprefix("RESULT"))
    assert bool(operators) == (serves == "library") and loaded == len(seeds) - 1
    return found


@pytest.mark.parametrize("serves", ["library", "bundled"])
def test_each_engine_computes_with_its_own_weights(model, tmp_path, serves):
    folder = model(recipes.QWEN3)
    (alone, _) = answers(folder, tmp_path / "alone", serves, 2)
    first, second, first_again, second_again = answers(folder, tmp_path / "both", serves, 1, 2)
    assert first == first_again != second
    assert second == second_again == alone
