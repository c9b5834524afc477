"""Each request's grammar is compiled by its own library, whatever other requests do at the same time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import UnsupportedRequest
from bi_patch.seams.common import structured

VOCABULARY = 70  # three columns of a mask


class Library:
    """A backend that keeps the grammar that it compiles in a field, as the library guidance does."""

    both = threading.Barrier(2, timeout=5)

    def __init__(self, name, columns=3, wait=False):
        self.name, self.columns, self.wait, self.destroyed = name, columns, wait, False

    def compile_grammar(self, kind, spec, stop_token_ids=None):
        self.compiling = spec
        if self.wait:
            self.both.wait()
        made = f"{self.name}: {self.compiling}"

        def fill(bitmask, index):
            assert bitmask.shape[1] == self.columns
            bitmask[index] = torch.arange(self.columns)

        return SimpleNamespace(made=made, fill_bitmask=fill)

    def allocate_token_bitmask(self, rows):
        return torch.full((rows, self.columns), -1, dtype=torch.int32)

    def destroy(self):
        self.destroyed = True


def backends(**made):
    config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: VOCABULARY))
    held = structured.Backends(config, lambda name, config, tokenizer: made[name])
    for name in made:
        held.prepare(name, None)
    return held


def test_libraries_stay_side_by_side_and_are_all_freed():
    made = {name: Library(name) for name in ("guidance", "xgrammar")}
    held = backends(**made)
    assert [held.of(name).compile_grammar("json", "{}").made for name in made] == ["guidance: {}", "xgrammar: {}"]
    held.destroy()
    assert all(library.destroyed for library in made.values())


def test_threads_do_not_mix_up_grammars():
    held = backends(guidance=Library("guidance", wait=True))
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda spec: held.of("guidance").compile_grammar("json", spec).made, "ab"))
    assert made == ["guidance: a", "guidance: b"]


@pytest.mark.parametrize("columns", [3, 5])
def test_a_library_of_a_larger_tokenizer_fills_the_shared_mask(columns):
    held = backends(wide=Library("wide", columns))
    mask = held.allocate_token_bitmask(2)
    assert mask.shape == (2, 3) and mask.dtype == torch.int32
    held.of("wide").compile_grammar("json", "{}").fill_bitmask(mask, 1)
    assert mask.tolist() == [[-1, -1, -1], [0, 1, 2]]


def test_an_unknown_library_is_named():
    config = SimpleNamespace(model_config=None)
    with pytest.raises(ValueError, match="Unsupported structured output backend: another"):
        structured.Backends(config).prepare("another", None)


@pytest.mark.parametrize("named, chosen", [("xgrammar", "xgrammar"), (None, "guidance"), ("auto", "guidance")])
def test_the_engine_core_chooses_for_a_client_that_did_not(named, chosen):
    """A client other than vLLM's Python front end names no library, and may not have checked the grammar."""
    asked = SimpleNamespace(_backend=named)
    config = SimpleNamespace(model_config="model", speculative_config=None, structured_outputs_config="auto")
    seen = []

    def verify(**given):
        assert asked._backend is None and given == vars(config) | {"tokenizer": "tokenizer"}
        asked._backend = "guidance"

    held = SimpleNamespace(prepare=lambda *given: seen.append(given), of=lambda name: f"the library {name}")
    manager = SimpleNamespace(vllm_config=config, tokenizer="tokenizer", backend=held)
    params = SimpleNamespace(structured_outputs=asked, verify=verify)
    request = SimpleNamespace(structured_output_request=object(), sampling_params=params)
    structured._init(lambda self, request: None)(manager, request)
    compiled = structured._compile(lambda self, request: self.backend)(manager, request)
    assert compiled == f"the library {chosen}" and set(seen) == {(chosen, "tokenizer")}


def test_a_request_without_a_grammar_chooses_nothing():
    structured._init(lambda self, request: None)(None, SimpleNamespace(structured_output_request=None))


def test_the_load_chooses_no_library(monkeypatch):
    """An expression that the first library does not read in time is refused, instead of going to the next library."""
    from vllm import envs
    from vllm.v1.structured_output import utils

    monkeypatch.setattr(envs, "VLLM_REGEX_COMPILATION_TIMEOUT_S", 0.05, raising=False)
    slow, ready = threading.Event(), threading.Event()
    ready.set()
    compile_regex = structured._note_late(utils.compile_regex_with_timeout)

    def choose(self, wait):
        try:
            compile_regex(lambda pattern: wait.wait(1), "a+")
        except ValueError:
            pass  # vLLM goes on with the next library

    chosen = structured._no_late_choice(choose)
    chosen(None, ready)
    with pytest.raises(UnsupportedRequest, match="structured.late_choice"):
        chosen(None, slow)
    chosen(None, ready)
