"""The certificate of attention calls a layer's own code on a paged cache, in every cut of a prompt, and sees faults."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.ops.certificates import Key
from bi_patch.ops.cuda import attention, attention_layers, chunks, spans
from bi_patch.seams.cuda import chunks as layers

PROBLEM = chunks.Problem("FLASH_ATTN 3", 4, 2, 8, 0, 16, torch.float64)
KEY = Key("", "", "", "", "")


class Backend:
    """vLLM's layout from 0.32 on; `Own` is a backend of vLLM 0.26, with a layout of its own."""

    @staticmethod
    def get_name():
        return "FLASH_ATTN"


class Own(Backend):
    @staticmethod
    def get_kv_cache_shape(pages, page, heads, size):
        return 2, pages, page, heads, size

    @staticmethod
    def get_kv_cache_stride_order():
        return 1, 0, 2, 3, 4


class Impl:
    """Causal attention, row by row. fault: "" or how a row depends on its step."""

    def __init__(self, fault):
        self.fault, self.vllm_flash_attn_version, self.logits_soft_cap = fault, 3, 0

    def _halves(self, cache):
        return cache.unbind(0) if cache.dim() == 5 else cache.transpose(1, 2).split(8, dim=-1)

    def do_kv_cache_update(self, layer, k, v, cache, slots):
        for half, given in zip(self._halves(cache), (k, v), strict=True):
            half[slots // 16, slots % 16] = given

    def forward(self, layer, q, k, v, cache, step, out):
        assert step.causal and step.max_num_splits == 1 and step.scheduler_metadata is None
        starts, lengths = step.query_start_loc.tolist(), step.seq_lens.tolist()
        assert len(q) == step.num_actual_tokens == starts[-1] and step.max_seq_len == max(lengths)
        longest = max(b - a for a, b in zip(starts, starts[1:], strict=False))
        assert step.max_query_len == max(longest, 128)  # heads of 64 and less
        for sequence, length in enumerate(lengths):
            pages = step.block_table[sequence].long()
            keys, values = (half[pages].flatten(0, 1).repeat_interleave(2, 1) for half in self._halves(cache))
            rows = range(starts[sequence], starts[sequence + 1])
            for row, position in zip(rows, range(length - len(rows), length), strict=True):
                held = slice(0, position + 1)
                scores = (keys[held] * q[row]).sum(-1)
                if self.fault == "chunk":
                    scores = scores + len(rows) * 1e-9
                if self.fault == "company":
                    scores[0] += len(lengths) * 1e-9
                out[row] = (scores.softmax(0)[..., None] * values[held]).sum(0)
        out[:] = out + 1e-9 * len(rows) if self.fault == "chunk" else out


def layer(fault="", backend=Backend):
    return SimpleNamespace(
        impl=Impl(fault),
        attn_backend=backend,
        num_heads=4,
        num_kv_heads=2,
        head_size=8,
        sliding_window=None,
        attn_type="decoder",
        dtype=torch.float64,
    )


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A prompt of 340 tokens, and no bundled kernel."""
    monkeypatch.setattr(attention_layers, "_TOKENS", 340)
    monkeypatch.setattr(chunks, "steps", STEPS)
    monkeypatch.setattr(attention, "serves", lambda problem: False)


def STEPS(tokens, made=chunks.steps):
    """The steps of a short prompt: those that lie inside it."""
    for what, sequences in made(tokens):
        kept = [(first, count) for first, count in sequences if first + count <= tokens]
        if kept and len(kept) <= 8:
            yield what, kept


@pytest.mark.parametrize("backend", [Backend, Own])
def test_rows_of_every_cut_are_those_of_the_whole_prompt(backend):
    held = layer(backend=backend)
    made = chunks._certify(PROBLEM, lambda *given: layers._prepare(held, PROBLEM, *given), KEY, "cpu")
    assert made.passed and made.evidence.compared > 5000


@pytest.mark.parametrize("fault", ["chunk", "company"])
def test_a_row_that_depends_on_its_step_fails(fault):
    held = layer(fault)
    made = chunks._certify(PROBLEM, lambda *given: layers._prepare(held, PROBLEM, *given), KEY, "cpu")
    assert not made.passed and "elements differ" in made.evidence.first


def test_each_kind_of_layer_once(monkeypatch):
    import sys

    module = SimpleNamespace(Attention=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.attention.attention", module)
    sinks, window = layer(), layer()
    sinks.impl.sinks, window.sliding_window = torch.zeros(4), 512
    held = dict(enumerate([layer(), sinks, layer(), window]))
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=None), compilation_config=SimpleNamespace(static_forward_context=held)
    )
    found = [problem for problem, _ in layers.layers(config)]
    assert found == [PROBLEM, PROBLEM._replace(extras="sinks"), PROBLEM._replace(window=512)]


def test_a_layer_of_a_model_whose_images_attend_in_both_directions_has_a_second_certificate(monkeypatch):
    import sys

    monkeypatch.setitem(
        sys.modules, "vllm.model_executor.layers.attention.attention", SimpleNamespace(Attention=SimpleNamespace)
    )
    held = layer()
    held.use_mm_prefix = True
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=None),
        compilation_config=SimpleNamespace(static_forward_context={0: held}),
    )
    (_, first), (_, second) = layers.layers(config)
    assert [type(problem) for problem, _ in layers.layers(config)] == [chunks.Problem, spans.Problem]
    given = []
    held.impl.forward = lambda layer, q, k, v, cache, step, out: given.append(step)
    q, k = (torch.zeros((340, heads, 8), dtype=torch.float64) for heads in (4, 2))
    run = second(q, k, k)
    run([(0, 340, True), (0, 9, False)], True)
    assert given[0].mm_prefix_range_tensor.tolist() == [[list(span) for span in spans.of(PROBLEM)], [[0, 0]] * 3]
    run([(20, 1, True)], False)
    assert given[1].mm_prefix_range_tensor is None
    first(q, k, k)([(0, 9)])
    assert given[2].mm_prefix_range_tensor is None
