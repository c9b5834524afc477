"""The patches, applied to a copy of the installed package, give the same engine as the import hooks: the same bits."""

import os

import pytest

from bi_patch.tools.models import recipes
from bi_patch.tools.upstream import apply
from bi_patch.tools.verify.child import ARMED
from bi_patch.tools.verify.probes import PROBES, Workload

pytestmark = pytest.mark.engine


def test_patched_copy_passes_the_same_probes(start, tmp_path):
    root = apply.patched_copy(tmp_path)
    answers = {}
    for form, path in (("patches", str(root)), ("hooks", "")):
        paths = os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH"))))
        environ = {"BI_PATCH_FORM": form, "PYTHONPATH": paths}
        with start(ARMED, recipes.QWEN3, environ=environ) as engine:
            load = Workload.random(engine.info.vocab_size, generate=6)
            load = Workload(load.subjects, load.fillers, load.long, load.generate, (1, 5, 16))
            for probe in (p for p in PROBES if p.name in ("batch size", "decode = prefill", "prefix cache")):
                result = probe.run(engine, load)
                assert result.compared > 0 and result.differing == 0, f"{form}: {result.axis}: {result.first}"
            answers[form] = engine.generate([load.greedy(i) for i in range(len(load.subjects))])
    assert answers["patches"] == answers["hooks"]
