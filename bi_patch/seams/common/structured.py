"""Structured output: each request is served by the grammar library that the request itself chooses."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib
import threading
from collections.abc import Callable
from typing import Any

from bi_patch.seams.common.refused import bad_request
from bi_patch.seams.model import Seam, Target
from bi_patch.seams.overlay import Overlay

_LIBRARIES = {
    "xgrammar": ("backend_xgrammar", "XgrammarBackend"),
    "guidance": ("backend_guidance", "GuidanceBackend"),
    "outlines": ("backend_outlines", "OutlinesBackend"),
    "lm-format-enforcer": ("backend_lm_format_enforcer", "LMFormatEnforcerBackend"),
}

_REMEMBERED = 1024


class Backends:
    """In the place of the manager's only StructuredOutputBackend: one backend for each library that a request chose.

    config: the engine's VllmConfig. make: (name, config, tokenizer) -> StructuredOutputBackend.
    """

    def __init__(self, config: Any, make: Any = None) -> None:
        self._config = config
        self._make = make or _made
        self._held: dict[str, Any] = {}
        self._choices: dict[bytes, str] = {}
        self._lock = threading.Lock()

    def choice(self, asked: Any, choose: Callable[[], str]) -> str:
        """The library for the content of a request's StructuredOutputsParams. choose: called for content that is new,
        or that the last _REMEMBERED contents do not hold."""
        names = (field.name for field in dataclasses.fields(asked) if not field.name.startswith("_"))
        key = hashlib.sha256(repr([getattr(asked, name) for name in names]).encode()).digest()
        found = self._choices.get(key)
        if found is None:
            found = choose()
            with self._lock:
                while len(self._choices) >= _REMEMBERED:
                    del self._choices[next(iter(self._choices))]
                self._choices[key] = found
        return found

    def prepare(self, name: str, tokenizer: Any) -> None:
        """Make the library's backend unless it exists. Raises ValueError for an unknown library."""
        with self._lock:
            if name not in self._held:
                self._held[name] = self._make(name, self._config, tokenizer)

    def of(self, name: str) -> _Compiler:
        """The compiler of the library's grammars. Raises KeyError for a library that was not prepared."""
        return _Compiler(self._held[name], self._width)

    def allocate_token_bitmask(self, rows: int) -> Any:
        """The mask that the requests of a step share: int32 [rows, vocabulary / 32 rounded up], all tokens allowed."""
        import torch

        return torch.full((rows, self._width), -1, dtype=torch.int32)

    def destroy(self) -> None:
        """Free every library."""
        while self._held:
            self._held.popitem()[1].destroy()

    @property
    def _width(self) -> int:
        return -(-self._config.model_config.get_vocab_size() // 32)


class _Compiler:
    """Compiles one library's grammars. backend: the library's. width: the columns of the mask of all requests."""

    def __init__(self, backend: Any, width: int) -> None:
        self._backend, self._width = backend, width

    def compile_grammar(self, *args: Any, **kwargs: Any) -> Any:
        # Threads compile side by side, and the guidance backend keeps the grammar that it compiles in a field.
        grammar = copy.copy(self._backend).compile_grammar(*args, **kwargs)
        own = self._backend.allocate_token_bitmask(1)
        if own.shape[1] != self._width:
            grammar.fill_bitmask = functools.partial(_fill_part, grammar.fill_bitmask, own.shape[1])
        return grammar


def _fill_part(fill: Any, width: int, bitmask: Any, index: int) -> None:
    """Fill a row of the shared mask from a row of the library's own width: a tokenizer can be larger than the model."""
    import torch

    row = torch.full((1, width), -1, dtype=torch.int32)
    fill(row, 0)
    bitmask[index].copy_(row[0, : bitmask.shape[1]])


def _made(name: str, config: Any, tokenizer: Any) -> Any:
    if name not in _LIBRARIES:
        raise ValueError(f"Unsupported structured output backend: {name}")
    module, kind = _LIBRARIES[name]
    found = getattr(importlib.import_module(f"vllm.v1.structured_output.{module}"), kind)
    return found(config, tokenizer=tokenizer, vocab_size=config.model_config.get_vocab_size())


def _manager(original):
    """StructuredOutputManager.__init__: hold a backend for each library instead of one backend."""

    @functools.wraps(original)
    def __init__(self, vllm_config, *args, **kwargs):
        original(self, vllm_config, *args, **kwargs)
        self.backend = Backends(vllm_config)

    return __init__


def _choose(manager: Any, request: Any) -> str:
    """The request's library, which is then ready to compile: the library that the rules of vLLM's Python front end
    choose for the request. A request of another client may name none, or a wrong one.

    Raises ValueError for a grammar that no library takes. Raises UnsupportedRequest for a wrong name.
    """
    params, tokenizer = request.sampling_params, getattr(manager, "tokenizer", None)
    asked = params.structured_outputs
    if asked._backend in (None, "auto"):
        _chosen(manager.vllm_config, params, tokenizer)
        manager.backend.choice(asked, lambda: asked._backend)
    else:
        own = manager.backend.choice(asked, lambda: _chosen(manager.vllm_config, _unnamed(params), tokenizer))
        if own != asked._backend:
            raise bad_request(
                f"structured.choice: the request names the grammar library {asked._backend!r}, and by its content "
                f"{own!r} serves it. Name no library in the request"
            )
    manager.backend.prepare(asked._backend, tokenizer)
    return asked._backend


def _chosen(config: Any, params: Any, tokenizer: Any) -> str:
    """The library that vLLM's front end would choose for SamplingParams, which it checks on the way."""
    params.structured_outputs._backend = None
    params.verify(
        model_config=config.model_config,
        speculative_config=config.speculative_config,
        structured_outputs_config=config.structured_outputs_config,
        tokenizer=tokenizer,
    )
    return params.structured_outputs._backend


def _unnamed(params: Any) -> Any:
    """A copy of SamplingParams to choose for: checking it changes nothing in the request."""
    params = copy.copy(params)
    params.structured_outputs = copy.copy(params.structured_outputs)
    return params


def _init(original):
    """StructuredOutputManager.grammar_init: choose the library first, while an error still belongs to the request."""

    @functools.wraps(original)
    def grammar_init(self, request, *args, **kwargs):
        if request.structured_output_request is not None:
            _choose(self, request)
        return original(self, request, *args, **kwargs)

    return grammar_init


def _compile(original):
    """StructuredOutputManager._create_grammar: compile with the request's own library."""

    @functools.wraps(original)
    def _create_grammar(self, request, *args, **kwargs):
        library = self.backend.of(_choose(self, request))
        return original(Overlay(self, backend=library), request, *args, **kwargs)

    return _create_grammar


class _Choice(threading.local):
    """Whether a regular expression ran out of time while this thread chose a library."""

    late = False


_choice = _Choice()


def _note_late(original):
    """compile_regex_with_timeout: note that the time ran out."""

    @functools.wraps(original)
    def compile_regex_with_timeout(*args, **kwargs):
        try:
            return original(*args, **kwargs)
        except ValueError as error:
            from concurrent.futures import TimeoutError

            _choice.late = _choice.late or isinstance(error.__context__, TimeoutError)
            raise

    return compile_regex_with_timeout


def _no_late_choice(original):
    """SamplingParams._validate_structured_outputs: refuse a library that was chosen because another was late."""

    @functools.wraps(original)
    def _validate_structured_outputs(self, *args, **kwargs):
        _choice.late = False
        original(self, *args, **kwargs)
        if _choice.late:
            raise bad_request(
                "structured.late_choice: the first grammar library did not read the regular expression within "
                "VLLM_REGEX_COMPILATION_TIMEOUT_S seconds, and the load must not choose the library. Shorten the "
                "expression, raise the variable, or name a library with --structured-outputs-config.backend"
            )

    return _validate_structured_outputs


_MODULE = "vllm.v1.structured_output"
_UNTIL = "upstream holds several libraries in one engine (https://github.com/vllm-project/vllm/issues/14779)"

SEAMS = (
    Seam(
        name="structured.backends",
        targets=(Target(_MODULE, "StructuredOutputManager.__init__"),),
        close=_manager,
        why="the first structured-output request after the start chooses the grammar library for all later requests",
        how="the engine holds every library that a request chose, and each grammar fills its own row of the mask",
        until=_UNTIL,
        causes=(28,),
    ),
    Seam(
        name="structured.choice",
        # vLLM-Ascend 0.23 replaces this method itself; there, structured.compile chooses.
        targets=(Target(_MODULE, "StructuredOutputManager.grammar_init", ">=0.26"),),
        close=_init,
        why="a request that does not come from vLLM's Python front end names no grammar library, or any library",
        how="the engine chooses the library by the request's content alone, with the rules of vLLM's front end, and "
        "refuses another name",
        until=_UNTIL,
        causes=(28,),
    ),
    Seam(
        name="structured.compile",
        targets=(Target(_MODULE, "StructuredOutputManager._create_grammar"),),
        close=_compile,
        why="vLLM compiles every grammar with the engine's only library, and the library guidance mixes up grammars "
        "that threads compile at the same time",
        how="each grammar is compiled with its request's own library, on a copy of the library's state",
        until=_UNTIL,
        causes=(28,),
    ),
    Seam(
        name="structured.late",
        targets=(
            Target(
                f"{_MODULE}.utils",
                "compile_regex_with_timeout",
                ">=0.26",
                copies=(
                    f"{_MODULE}.backend_xgrammar",
                    f"{_MODULE}.backend_outlines",
                    f"{_MODULE}.backend_lm_format_enforcer",
                ),
            ),
        ),
        close=_note_late,
        why="under load, a long regular expression takes longer than vLLM's time limit",
        how="bi_patch notes that the time ran out, for the patch point structured.late_choice",
        until="upstream does not choose another library after the time limit",
        causes=(28,),
    ),
    Seam(
        name="structured.late_choice",
        targets=(Target("vllm.sampling_params", "SamplingParams._validate_structured_outputs", ">=0.26"),),
        close=_no_late_choice,
        why="if the first library does not read a regular expression in time, vLLM takes another library, so the load "
        "chooses it",
        how="bi_patch refuses such a request by name as a bad request",
        until="upstream does not choose another library after the time limit",
        causes=(28,),
    ),
)
