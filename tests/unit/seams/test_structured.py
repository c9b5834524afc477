"""Each request's grammar is compiled by its own library, whatever other requests do at the same time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import UnsupportedRequest
from bi_patch.seams.common import structured

VOCABULARY = 70  # three columns of a mask


class Library:
    """A backend that keeps the grammar that it compiles in a field, as the library guidance does."""

    both = threading.Barrier(2, timeout=600)

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


@dataclass
class Asked:
    """Stands for vLLM's StructuredOutputsParams."""

    json: str
    _backend: str | None = None


class Params:
    """Stands for vLLM's SamplingParams: the content "{guidance}" chooses the library guidance, and so on."""

    def __init__(self, asked, seen):
        self.structured_outputs, self.seen = asked, seen

    def verify(self, **given):
        self.seen.append(given)
        assert self.structured_outputs._backend is None
        self.structured_outputs._backend = self.structured_outputs.json.strip("{}")


def ask(backends, asked, seen):
    """Init and compile one grammar; returns its library."""
    config = SimpleNamespace(model_config="model", speculative_config=None, structured_outputs_config="auto")
    manager = SimpleNamespace(vllm_config=config, tokenizer="tokenizer", backend=backends)
    request = SimpleNamespace(structured_output_request=object(), sampling_params=Params(asked, seen))
    structured._init(lambda self, request: None)(manager, request)
    compiler = structured._compile(lambda self, request: self.backend)(manager, request)
    assert all(given == vars(config) | {"tokenizer": "tokenizer"} for given in seen)
    return compiler.compile_grammar("json", asked.json).made


@pytest.mark.parametrize("named", ["guidance", None, "auto"])
def test_the_engine_core_chooses_by_the_content(named):
    """A client other than vLLM's Python front end names no library, and may not have checked the grammar."""
    held, seen, asked = backends(guidance=Library("guidance")), [], Asked("{guidance}", named)
    assert ask(held, asked, seen) == "guidance: {guidance}" and asked._backend == "guidance"
    assert ask(held, Asked("{guidance}", "guidance"), seen) and len(seen) == 1  # known content is not chosen again


def test_a_library_that_the_content_does_not_choose_is_refused():
    held, seen = backends(guidance=Library("guidance"), xgrammar=Library("xgrammar")), []
    for _ in range(2):
        with pytest.raises(UnsupportedRequest, match="names the grammar library 'xgrammar', .* 'guidance' serves it"):
            ask(held, Asked("{guidance}", "xgrammar"), seen)
    assert ask(held, Asked("{xgrammar}", "xgrammar"), seen)
    assert len(seen) == 2


def test_old_choices_are_forgotten(monkeypatch):
    monkeypatch.setattr(structured, "_REMEMBERED", 2)
    held, seen = backends(guidance=Library("guidance")), []
    for content in ("{guidance}", "{{guidance}}", "{{{guidance}}}", "{{guidance}}", "{guidance}"):
        ask(held, Asked(content, "guidance"), seen)
    assert len(seen) == 4


def test_a_request_without_a_grammar_chooses_nothing():
    structured._init(lambda self, request: None)(None, SimpleNamespace(structured_output_request=None))


def test_the_load_chooses_no_library(monkeypatch):
    """An expression that the first library does not read in time is refused, instead of going to the next library."""
    from vllm import envs
    from vllm.v1.structured_output import utils

    slow, ready = threading.Event(), threading.Event()
    ready.set()
    compile_regex = structured._note_late(utils.compile_regex_with_timeout)

    def choose(self, wait):
        limit = 0.05 if wait is slow else 600
        monkeypatch.setattr(envs, "VLLM_REGEX_COMPILATION_TIMEOUT_S", limit, raising=False)
        try:
            compile_regex(lambda pattern: wait.wait(600), "a+")
        except ValueError:
            pass  # vLLM goes on with the next library

    chosen = structured._no_late_choice(choose)
    chosen(None, ready)
    with pytest.raises(UnsupportedRequest, match="structured.late_choice"):
        chosen(None, slow)
    slow.set()
    chosen(None, ready)
