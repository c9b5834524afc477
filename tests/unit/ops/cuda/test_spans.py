"""The certificate of attention over images, with a stand-in for a layer on CPU."""

import pytest
import torch

from bi_patch.ops.certificates import Key
from bi_patch.ops.cuda import attention_layers, spans

PROBLEM = spans.Problem("TRITON_ATTN", 2, 1, 8, 0, 16, torch.float64)
TOKENS = 400


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(attention_layers, "_TOKENS", TOKENS)
    monkeypatch.setattr(spans, "_SPANS", ((37, 92), (93, 110), (200, 255)))


@pytest.mark.parametrize("size", [16, 129, 300])
def test_no_step_ends_inside_a_span(size):
    own = spans.of(PROBLEM)
    cuts = spans.cuts(own, TOKENS, size)
    assert cuts[0][0] == 0 and sum(count for _, count in cuts) == TOKENS
    assert all(a + n == b for (a, n), (b, _) in zip(cuts, cuts[1:]))
    assert not any(first < at + count <= last for at, count in cuts for first, last in own)


def test_no_sequence_ends_inside_a_span_and_rows_of_spans_are_named(monkeypatch):
    monkeypatch.undo()
    own = spans.of(PROBLEM)
    for what, step, named in spans.steps(own, 1500):
        for first, count, marked in step:
            assert 0 <= first and 0 < count <= 1500 - first, what
            end = first + count
            assert not marked or not any(start < end <= last for start, last in own), what
            assert not marked or named or not any(start <= first < last for start, last in own), what


def test_a_span_is_no_longer_than_the_window():
    assert spans.of(PROBLEM._replace(window=20)) == [(37, 56), (93, 110), (200, 219)]


def prepare(fault=""):
    """Rows of one prompt: causal attention, and both directions inside spans. fault: how a row depends on its step."""

    def made(q, k, v):
        keys, values = (part.repeat_interleave(2, 1) for part in (k, v))

        def run(step, named):
            rows = []
            for first, count, marked in step:
                for at in range(first, first + count):
                    seen = at
                    for start, last in spans.of(PROBLEM) if named and marked else ():
                        seen = min(last, first + count - 1) if start <= at <= last else seen
                    scores = (keys[: seen + 1] * q[at]).sum(-1)
                    if fault == "named" and named and not marked:
                        scores[0] += 1e-9
                    if fault == "company":
                        scores[0] += len(step) * 1e-9
                    rows.append((scores.softmax(0)[..., None] * values[: seen + 1]).sum(0))
            return torch.stack(rows)

        return run if fault != "causal" else lambda step, named: run(step, False)

    return made


def steps(own, tokens, made=spans.steps):
    return [(what, step, named) for what, step, named in made(own, tokens) if len(step) <= 6]


def certify(monkeypatch, fault=""):
    monkeypatch.setattr(spans, "steps", steps)
    return spans._certify(PROBLEM, prepare(fault), Key("", "", "", "", ""), "cpu")


def test_rows_of_every_step_are_those_of_the_whole_prompt(monkeypatch):
    made = certify(monkeypatch)
    assert made.passed and made.evidence.compared > 5000


@pytest.mark.parametrize("fault", ["named", "company"])
def test_a_row_that_depends_on_its_step_fails(monkeypatch, fault):
    made = certify(monkeypatch, fault)
    assert not made.passed and "elements differ" in made.evidence.first


def test_a_layer_that_knows_no_spans_fails(monkeypatch):
    with pytest.raises(ArithmeticError, match="causal"):
        certify(monkeypatch, "causal")
