"""Cost rows, evidence files, tables and marks; the matrix's probes on an engine that is made of arithmetic."""

import msgspec
import pytest

from bi_patch.bench import cost, evidence
from bi_patch.verify import probes
from bi_patch.verify.answers import Answer
from bi_patch.verify.child import ARMED, STOCK, UPSTREAM, child_environ
from bi_patch.verify.engine import Info, Options, short_name

INFO = Info("armed", "0.32.0", "2.13.0+cpu", "CPU", 2, 16, 500)


class Arithmetic:
    """An engine whose answers are a function of the request; `leak` lets the batch reach the logprobs."""

    def __init__(self, leak=False, **options):
        self.options = Options("none", max_model_len=4096, **options)
        self.info = INFO
        self.leak = leak
        self.cached = 0
        self.warm = set()

    def generate(self, requests):
        return [self._answer(r, len(requests) if self.leak else 0) for r in requests]

    def _answer(self, request, batch):
        key = request.prompt[:16]
        self.cached += 16 * (key in self.warm)
        self.warm.add(key)
        ids = [*request.prompt, *range(request.max_tokens)]
        if request.prompt_logprobs is None:
            scored = []
        else:
            scored = [-float(i + 1) for i in range(1, len(request.prompt))]
        made = [-float(len(request.prompt) + i + 1) - batch * 1e-3 for i in range(request.max_tokens)]
        return Answer(ids[len(request.prompt):], made, [[] for _ in made], scored, [[] for _ in scored])

    def reset_cache(self):
        self.warm.clear()

    def set_chunk(self, tokens):
        self.chunk = tokens

    def counters(self):
        return {probes.HITS: float(self.cached), probes.PREEMPTIONS: 0.0}


WORKLOAD = probes.Workload.random(500, long=600, lengths=(3, 40, 70), prefix=40)


@pytest.mark.parametrize("probe", probes.PROBES, ids=lambda p: p.name)
def test_every_probe_passes_an_invariant_engine_and_compares_something(probe):
    result = probe.run(Arithmetic(), WORKLOAD)
    assert result.axis == probe.name and result.compared > 0 and result.differing == 0 and not result.first


@pytest.mark.parametrize("probe", [p for p in probes.PROBES if p.name not in ("decode = prefill", "prompt logprobs")],
                         ids=lambda p: p.name)
def test_every_probe_catches_a_batch_that_leaks(probe):
    result = probe.run(Arithmetic(leak=True), WORKLOAD)
    assert result.differing > 0 and result.largest > 0 and result.first


@pytest.mark.parametrize("cross", probes.CROSS_PROBES, ids=lambda p: p.name)
def test_cross_probes(cross):
    base = Arithmetic()
    expected = cross.collect(base, WORKLOAD)
    changes = cross.changes(base)
    assert changes
    for change in changes:
        other = Arithmetic()
        if cross.name == "preemption":
            with pytest.raises(probes.NotExercised, match="preemption"):
                cross.collect(other, WORKLOAD, change)
            continue
        result = cross.judge(change, expected, cross.collect(other, WORKLOAD, change))
        assert result.compared > 0 and result.differing == 0


def test_probes_that_cannot_happen_say_so():
    with pytest.raises(probes.NotExercised):
        list(probes.prefix_cache(probes.Run(Arithmetic(prefix_caching=False), WORKLOAD)))
    with pytest.raises(probes.NotExercised):
        list(probes.long_prompt(probes.Run(Arithmetic(), probes.Workload.random(500))))
    assert "off" in named(probes.PROBES, "prefix cache").missing(Arithmetic(prefix_caching=False))
    assert "one device" in named(probes.FEATURE_PROBES, "tensor parallel size").missing(Arithmetic())


def named(registry, name):
    return next(probe for probe in registry if probe.name == name)


def test_every_difference_keeps_the_pair_that_shows_it():
    leaking = probes.Run(Arithmetic(leak=True), WORKLOAD)
    for probe in probes.PROBES:
        for case in probe.cases(leaking):
            assert case.axis == probe.name and case.label
            assert case.alone.request.prompt == case.company.request.prompt or case.part == "decode"
            if case.differs and not case.part:
                (again,) = [Arithmetic(leak=True).generate(case.company.requests)[case.company.index]]
                assert again.logprobs == case.got.logprobs


def test_a_cost_row_takes_medians_and_paired_ratios():
    row = cost.row("m", "w", {STOCK: [10.0, 20.0, 40.0], ARMED: [11.0, 20.0, 42.0]}, 3)
    assert (row.stock, row.upstream, row.armed, row.ratio) == (20.0, None, 20.0, 1.05)
    assert row.stock_range == (10.0, 40.0)
    assert cost.is_noisy(row)
    assert not cost.is_noisy(cost.row("m", "w", {STOCK: [10.0, 11.0], ARMED: [11.0, 12.0]}, 2))


def made(model, **changes):
    found = evidence.new(evidence.Invariance, INFO)
    found.rows = [evidence.InvarianceRow(model, "batch size", 1000, 0)]
    return msgspec.structs.replace(found, **changes)


def test_files_are_named_and_keep_other_models(tmp_path):
    path = evidence.write(made("a"), "cpu", tmp_path)
    assert path.name == f"invariance-{made('a').date}-cpu-vllm-0.32.0.json"
    evidence.write(made("b"), "cpu", tmp_path)
    evidence.write(made("b"), "cpu", tmp_path)
    newest = evidence.newest(evidence.Invariance, tmp_path)
    assert [r.model for r in newest.rows] == ["a", "b"]
    table = evidence.invariance_table(newest)
    assert "| batch size | 0 / 1,000 | 0 / 1,000 |" in table and "0 of 2,000 positions differ" in table


def test_no_file_is_a_named_error(tmp_path):
    with pytest.raises(evidence.EvidenceMissing, match="bi-patch bench"):
        evidence.newest(evidence.Cost, tmp_path)


def test_tables_stand_between_their_marks():
    text = "# R\n<!-- cost -->\nold\n<!-- /cost -->\nend\n"
    assert evidence.replace_between(text, "cost", "new\n") == "# R\n<!-- cost -->\nnew\n<!-- /cost -->\nend\n"
    with pytest.raises(evidence.EvidenceMissing):
        evidence.replace_between(text, "invariance", "")


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from bi_patch.bench import plot

    found = evidence.new(evidence.Cost, INFO)
    found.rows = [cost.row("m", "w", {STOCK: [10.0], ARMED: [11.0]}, 1)]
    plot.cost(found, tmp_path / "cost.svg")
    assert (tmp_path / "cost.svg").read_text().startswith("<?xml")
    assert "| m | w | 10.0 ms | - | 11.0 ms | 1.10 |" in evidence.cost_table(found)


@pytest.mark.parametrize(
    ("device", "short"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100"), ("NVIDIA GeForce RTX 4090", "4090")],
)
def test_short_names_of_devices(device, short):
    assert short_name(device) == short


def test_children_are_told_their_mode():
    eager, compiled = Options("m"), Options("m", eager=False)
    given = {"VLLM_BATCH_INVARIANT": "1", "BI_PATCH_LEAVE_OPEN": "x", "VLLM_CPU_KVCACHE_SPACE": "3"}
    stock = child_environ(given, STOCK, eager)
    assert stock["BI_PATCH"] == "0" and "VLLM_BATCH_INVARIANT" not in stock
    assert stock["TORCHDYNAMO_DISABLE"] == "1" and stock["VLLM_CPU_KVCACHE_SPACE"] == "3"
    armed = child_environ(given, ARMED, compiled)
    assert (armed["BI_PATCH"], armed["VLLM_BATCH_INVARIANT"], armed["BI_PATCH_LEAVE_OPEN"]) == ("1", "1", "x")
    assert "TORCHDYNAMO_DISABLE" not in armed
    upstream = child_environ(given, UPSTREAM, eager)
    assert (upstream["BI_PATCH"], upstream["VLLM_BATCH_INVARIANT"]) == ("0", "1")


def test_platforms_of_a_kind(tmp_path):
    for name in ("cost-2026-01-02-cpu-vllm-0.32.0.json", "cost-2026-01-02-h100-vllm-0.33.0.json", "other.json"):
        (tmp_path / name).write_text("{}")
    assert evidence.platforms(evidence.Cost, tmp_path) == ["cpu", "h100"]
    assert evidence.platforms(evidence.Invariance, tmp_path) == []
