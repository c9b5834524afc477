"""Finds the target's rows in vLLM's model runner. No other module of verify uses the runner's names.

The target is the traced request. Supports model runners V1 and V2 of vLLM 0.23 to 0.33, in this process (one rank).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch

from bi_patch.errors import BiPatchError
from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.trace import (
    ACCEPTED,
    CACHE,
    FORWARD,
    LOGITS,
    LOGPROBS,
    POOLED,
    RETURNED,
    SAMPLE,
    SEED,
    WIDTH,
    Rows,
    Tracer,
    chain,
    digest_rows,
)

ENCODED = "encoded images"  # the op of a call that records the rows that enter the language model
MASKED = "grammar mask"  # the op of a call that records the logits of a request whose grammar masked them


class NotTraceable(BiPatchError):
    """The engine's model does not run in this process, or verify does not know its model runner."""


def model_runner(engine) -> object:
    """The model runner of a LocalEngine. Raises NotTraceable."""
    try:
        worker = engine.core.model_executor.driver_worker
        worker = getattr(worker, "worker", worker)
        runner = worker.model_runner
    except AttributeError as error:
        where = type(getattr(engine.core, "model_executor", engine.core)).__name__
        raise NotTraceable(f"the model runs in other processes ({where}), so it cannot be traced") from error
    return runner


def attach(runner, tracer: Tracer, requests: Sequence[Request], index: int) -> Attached:
    """Connect the tracer to a model runner V1 or V2; the target is `requests[index]`. Raises NotTraceable."""
    for kind in (Attached, AttachedV2):
        if all(hasattr(runner, name) for name in kind.NEEDED):
            return kind(runner, tracer, requests, index)
    raise NotTraceable(f"{type(runner).__module__}.{type(runner).__name__} is neither model runner V1 nor V2")


def module_names(runner) -> dict[int, str]:
    """The path of every module of the model and the sampler, by id(module)."""
    named = runner.sampler.named_modules() if isinstance(runner.sampler, torch.nn.Module) else ()
    names = {id(m): f"sampler.{name}".rstrip(".") for name, m in named}
    pooler = getattr(runner.get_model(), "pooler", None)
    for task, part in getattr(pooler, "poolers_by_task", {}).items():  # vLLM keeps them in a plain dict
        names |= {id(m): f"pooler.{task}.{name}".rstrip(".") for name, m in part.named_modules()}
    return names | {id(m): name for name, m in runner.get_model().named_modules()}


class Attached:
    """Model runner V1 with a tracer: in every step, the tracer learns which rows are the target's."""

    NEEDED = ("_model_forward", "_sample", "_get_prompt_logprobs_dict", "input_batch", "requests")

    def __init__(self, runner, tracer: Tracer, requests: Sequence[Request], index: int) -> None:
        self._runner, self._tracer = runner, tracer
        self._prompt = list(requests[index].prompt)
        arrivals = sorted(range(len(requests)), key=lambda i: requests[i].delay)
        same = [i for i in arrivals if list(requests[i].prompt) == self._prompt]
        self._turn = same.index(index)  # the order of arrival tells requests with the same prompt apart
        self._constrained = bool(requests[index].grammar)
        self._target: str | None = None
        self._step = -1
        self._scheduled = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within this context, the tracer sees the target's steps. At its end, everything replaced is restored."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._tracer.hooked())
            for owner, name, wrap in (*self._wrapped(), *self._pooled()):
                if not hasattr(owner, name):  # a pooling model has no logits
                    continue
                stack.enter_context(replaced(owner, name, wrap))
            if not self._tracer.coarse:
                for layer in self._layers():
                    # An MLA layer computes attention itself.
                    owner, name = (layer.impl, "forward") if hasattr(layer.impl, "forward") else (layer, "forward_impl")
                    stack.enter_context(replaced(owner, name, lambda held, of=layer: self._attend(held, of)))
                    if hasattr(layer.impl, "do_kv_cache_update"):
                        stack.enter_context(replaced(layer.impl, "do_kv_cache_update", self._inside))
                for module in self._runner.get_model().modules():
                    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
                    experts = getattr(kernel, "fused_experts", None)
                    if experts is not None:
                        stack.enter_context(replaced(experts, "apply", self._inside))
            yield

    def _wrapped(self):
        """(owner, attribute, function that makes the replacement)."""
        runner, sampler = self._runner, self._runner.sampler
        return (
            (runner, "execute_model", self._execute),
            (runner, "_model_forward", self._forward),
            (runner, "_sample", self._sample),
            (runner, "_get_prompt_logprobs_dict", self._prompt_logprobs),
            (runner.get_model(), "compute_logits", self._logits),
            (sampler, "compute_logprobs", self._logprobs),
            (sampler, "gather_logprobs", self._logprobs),
        )

    def _pooled(self):
        """What to wrap of a runner that pools: each of the target's poolers."""
        pooler = getattr(self._runner.get_model(), "pooler", None)
        return () if pooler is None else ((pooler, "forward", self._pool),)

    def _pool(self, held):
        def forward(hidden_states, pooling_metadata, *args, **kwargs):
            place = self._place() if self._scheduled is not None else None
            if place is None:
                return held(hidden_states, pooling_metadata, *args, **kwargs)
            row, _, count, position = place
            sizes = frozenset({len(pooling_metadata.pooling_params)})
            rows = Rows(self._step, POOLED, sizes, row, 1, position + count - 1)
            with self._tracer.phase(rows):
                result = held(hidden_states, pooling_metadata, *args, **kwargs)
            mine = result[row]
            if mine is not None:
                one = Rows(self._step, POOLED, frozenset({1}), 0, 1, position + count - 1)
                self._tracer.record("pooled vector", [mine[None]], rows=one, module="pooler")
            return result

        return forward

    def _context(self) -> dict:
        return self._runner.vllm_config.compilation_config.static_forward_context

    def _layers(self) -> list:
        context = self._context()
        return [layer for layer in context.values() if hasattr(layer, "impl") and hasattr(layer, "kv_cache")]

    def _execute(self, held):
        def execute_model(scheduler_output, *args, **kwargs):
            self._step += 1
            self._scheduled = scheduler_output
            self._find(scheduler_output)
            return held(scheduler_output, *args, **kwargs)

        return execute_model

    def _find(self, scheduler_output) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            if self._target is None and _text(new) == self._prompt:
                if self._turn == 0:
                    self._target = new.req_id
                self._turn -= 1

    def _place(self) -> tuple[int, int, int, int] | None:
        """The target in this step, or None: (its row, its first token's row, tokens, first token's position)."""
        count = self._scheduled.num_scheduled_tokens.get(self._target, 0) if self._target is not None else 0
        if not count:
            return None
        batch = self._runner.input_batch
        row = batch.req_id_to_index[self._target]
        before = sum(self._scheduled.num_scheduled_tokens[name] for name in batch.req_ids[:row])
        return row, before, count, int(batch.num_computed_tokens_cpu[row])

    def _forward(self, held):
        def _model_forward(*args, **kwargs):
            place = self._place()
            if place is None:
                return held(*args, **kwargs)
            _, start, count, position = place
            ids = kwargs.get("input_ids", args[0] if args else None)
            sizes = {self._scheduled.total_num_scheduled_tokens}
            if ids is not None:
                sizes.add(ids.shape[0])
            rows = Rows(self._step, FORWARD, frozenset(sizes), start, count, position)
            self._encoded(rows, kwargs)
            with self._tracer.phase(rows):
                result = held(*args, **kwargs)
            if self._tracer.coarse:
                self._coarse(rows, result)
            return result

        return _model_forward

    def _encoded(self, rows: Rows, kwargs) -> None:
        """Record the rows with which a model that takes images begins: encoded images and embedded tokens."""
        entering = kwargs.get("inputs_embeds")
        if entering is not None:
            whole = dataclasses.replace(rows, sizes=frozenset({entering.shape[0]}))
            self._tracer.record(ENCODED, [entering], rows=whole, module="image encoder")

    def _coarse(self, rows: Rows, result) -> None:
        """Record the results of compiled code: each layer's keys and values, and the last hidden states."""
        for name, layer in self._context().items():
            if hasattr(layer, "kv_cache"):
                self._cache(layer, name, rows)
        self._tracer.record("hidden states", [result], rows=rows, module="model")

    def _logits(self, held):
        def compute_logits(hidden_states, *args, **kwargs):
            rows = self._logit_rows(hidden_states)
            if rows is None:
                self._tracer.set_rows(None)
                return held(hidden_states, *args, **kwargs)
            with self._tracer.phase(rows):
                result = held(hidden_states, *args, **kwargs)
            if self._tracer.coarse:
                self._tracer.record("logits", [result], rows=rows, module="logits_processor")
            return result

        return compute_logits

    def _logit_rows(self, hidden_states) -> Rows | None:
        place = self._place() if self._scheduled is not None else None
        if place is None:
            return None
        row, start, count, position = place
        if self._prompt_hidden is None:
            if position + count < self._tokens():
                return None  # an unfinished prompt: vLLM drops the token that it samples here
            sizes = frozenset({hidden_states.shape[0]})
            first, drafts = self._first_logits(row), self._drafts(self._target)
            where = (sizes, first, 1 + drafts, position + count - 1 - drafts)
            self._logprob_rows = Rows(self._step, LOGPROBS, *where)
            return Rows(self._step, LOGITS, *where)
        whole = self._prompt_hidden
        offset = (hidden_states.data_ptr() - whole.data_ptr()) // (whole.stride(0) * whole.element_size())
        number = hidden_states.shape[0]
        if offset != start:
            self._logprob_rows = None
            return None
        self._logprob_rows = Rows(self._step, LOGPROBS, frozenset({number}), 0, number, position)
        return Rows(self._step, LOGITS, frozenset({number}), 0, number, position)

    _prompt_hidden: torch.Tensor | None = None
    _logprob_rows: Rows | None = None

    def _tokens(self) -> int:
        return self._runner.requests[self._target].num_tokens

    def _drafts(self, name: str) -> int:
        """The drafts that this step checks for a request."""
        return len(self._scheduled.scheduled_spec_decode_tokens.get(name, ()))

    def _first_logits(self, row: int) -> int:
        """The target's first row of the step's logits. row: the target's place in the batch."""
        return row + sum(self._drafts(name) for name in self._runner.input_batch.req_ids[:row])

    def _logprobs(self, held):
        def logprobs(*args, **kwargs):
            if self._logprob_rows is None:
                return held(*args, **kwargs)
            with self._tracer.phase(self._logprob_rows):
                result = held(*args, **kwargs)
            if self._tracer.coarse:
                flat = result if isinstance(result, tuple) else (result,)
                self._tracer.record("logprobs", flat, rows=self._logprob_rows, module="sampler")
            return result

        return logprobs

    def _sample(self, held):
        def _sample(logits, *args, **kwargs):
            place = self._place() if self._scheduled is not None else None
            if place is None or place[3] + place[2] < self._tokens():
                self._logprob_rows = None
                return held(logits, *args, **kwargs)
            row, _, count, position = place
            sizes = frozenset({logits.shape[0]})
            drafts = self._drafts(self._target)
            rows = Rows(self._step, SAMPLE, sizes, self._first_logits(row), 1 + drafts, position + count - 1 - drafts)
            self._record_seed(rows)
            if self._constrained:
                self._tracer.record(MASKED, [logits], rows=rows, module="structured output")
            with self._tracer.phase(rows):
                result = held(logits, *args, **kwargs)
            self._logprob_rows = None
            self._sampled(result.sampled_token_ids[row], rows)
            return result

        return _sample

    def _sampled(self, tokens: torch.Tensor, rows: Rows) -> None:
        """Record the target's new tokens of a step, [1] or, with drafts, [most drafts + 1] with -1 after the last."""
        with self._tracer.paused():
            new = tokens[tokens >= 0]
        kept = dataclasses.replace(rows, sizes=frozenset({len(new)}), start=0, count=len(new))
        if rows.count > 1:
            self._tracer.record(ACCEPTED, [new], rows=kept, module="sampler")
            self._tracer.cut(rows.step, rows.position + len(new))
        self._tracer.record("sampled token", [new], rows=kept, module="sampler")

    def _seed(self) -> int | None:
        """The seed with which the runner samples the target, None for a greedy target."""
        return self._runner.requests[self._target].sampling_params.seed

    def _record_seed(self, rows: Rows) -> None:
        seed = self._seed()
        if seed is not None:
            one = Rows(rows.step, SAMPLE, frozenset({1}), 0, 1, rows.position)
            self._tracer.record(SEED, [torch.tensor([seed], dtype=torch.int64)], rows=one, module="sampler")

    def _prompt_logprobs(self, held):
        def _get_prompt_logprobs_dict(hidden_states, *args, **kwargs):
            self._prompt_hidden, self._logprob_rows = hidden_states, None
            try:
                result = held(hidden_states, *args, **kwargs)
            finally:
                self._prompt_hidden = self._logprob_rows = None
            self._returned(result.get(self._target))
            return result

        return _get_prompt_logprobs_dict

    def _returned(self, mine) -> None:
        """Record the prompt logprobs that the runner returns for the target, if any."""
        if mine is not None:
            number = len(mine.logprobs)
            rows = Rows(self._step, RETURNED, frozenset({number}), 0, number, 0)
            self._tracer.record("prompt logprobs", list(mine[:3]), rows=rows, module="model runner")

    def _inside(self, held):
        def inside(*args, **kwargs):
            if self._tracer.rows is None:
                return held(*args, **kwargs)
            with self._tracer.again():
                return held(*args, **kwargs)

        return inside

    def _attend(self, held, layer):
        def forward(*args, **kwargs):
            rows = self._tracer.rows
            if rows is None:
                return held(*args, **kwargs)
            self._cache(layer, self._tracer.current()[1], rows)
            # On CUDA only the surrounding op is recorded: a dispatch mode cannot pass on FlashAttention's results.
            with contextlib.nullcontext() if args[1].is_cuda else self._tracer.again():
                return held(*args, **kwargs)

        return forward

    def _cache(self, layer, path: str, rows: Rows) -> None:
        """Record, for each position, a digest of the keys and values in the full blocks up to this position."""
        cache = layer.kv_cache
        cache = cache[0] if isinstance(cache, (list, tuple)) else cache
        blocks = self._runner.kv_cache_config.num_blocks
        groups = getattr(self._runner.kv_cache_config, "kv_cache_groups", [None])
        if not isinstance(cache, torch.Tensor) or blocks not in cache.shape or len(groups) > 1:
            return  # each of several groups has its own block table and block size
        size = self._runner.vllm_config.cache_config.block_size
        full = (rows.position + rows.count) // size
        ids = self._blocks(full)
        axis = list(cache.shape).index(blocks)
        with self._tracer.paused():
            held = cache.movedim(axis, 0)[ids.to(device=cache.device, dtype=torch.int64)] if full else None
            chained = chain(digest_rows(held) if full else b"")
        digests = b"".join(chained[(rows.position + i + 1) // size] for i in range(rows.count))
        assert len(digests) == WIDTH * rows.count
        self._tracer.add(CACHE, 0, rows, digests, tuple(cache.shape), tuple(cache.stride()), cache.dtype, layer, path)

    def _blocks(self, full: int) -> torch.Tensor:
        """The ids of the target's first `full` blocks."""
        row = self._runner.input_batch.req_id_to_index[self._target]
        return torch.as_tensor(self._runner.input_batch.block_table[0].block_table.np[row, :full].copy())


class AttachedV2(Attached):
    """Model runner V2 with a tracer."""

    NEEDED = ("prepare_inputs", "sample", "prompt_logprobs_worker", "req_states", "block_tables")
    _batch = None

    def _wrapped(self):
        runner, model = self._runner, self._runner.get_model()
        wrapped = [
            (runner, "execute_model", self._execute),
            (runner, "prepare_inputs", self._prepared),
            (runner, "sample", self._sample),
            (runner.prompt_logprobs_worker, "compute_prompt_logprobs", self._prompt_logprobs),
            (model, "compute_logits", self._logits),
            (model, "forward", self._forward),
        ]
        if self._constrained:
            wrapped.append((runner.structured_outputs_worker, "apply_grammar_bitmask", self._masked))
        manager = getattr(runner, "cudagraph_manager", None)
        if self._tracer.coarse and manager is not None:
            wrapped.append((manager, "run_fullgraph", self._forward))
        return wrapped

    def _prepared(self, held):
        def prepare_inputs(*args, **kwargs):
            self._batch = held(*args, **kwargs)
            return self._batch

        return prepare_inputs

    def _masked(self, held):
        def apply_grammar_bitmask(logits, *args, **kwargs):
            held(logits, *args, **kwargs)
            if self._tracer.rows is not None:
                rows = dataclasses.replace(self._tracer.rows, sizes=frozenset({logits.shape[0]}))
                self._tracer.record(MASKED, [logits], rows=rows, module="structured output")

        return apply_grammar_bitmask

    def _row(self) -> int | None:
        names = list(self._batch.req_ids) if self._batch is not None else []
        return names.index(self._target) if self._target in names else None

    def _place(self) -> tuple[int, int, int, int] | None:
        row = self._row() if self._target is not None else None
        if row is None:
            return None
        batch = self._batch
        count = int(batch.num_scheduled_tokens[row])
        first = int(batch.cu_num_logits_np[row]) if hasattr(batch, "cu_num_logits_np") else row
        return first, int(batch.query_start_loc_np[row]), count, int(batch.num_computed_tokens_np[row])

    def _tokens(self) -> int:
        return int(self._batch.prefill_len_np[self._row()])

    def _drafts(self, name: str) -> int:
        return 0  # of a step with drafts, only the first row is traced

    def _first_logits(self, row: int) -> int:
        return row  # the place has the row already

    def _forward(self, held):
        def forward(*args, **kwargs):
            place = self._place()
            if place is None:
                return held(*args, **kwargs)
            _, start, count, position = place
            sizes = frozenset({int(self._batch.num_tokens), int(self._batch.num_tokens_after_padding)})
            rows = Rows(self._step, FORWARD, sizes, start, count, position)
            self._encoded(rows, kwargs)
            with self._tracer.phase(rows):
                result = held(*args, **kwargs)
            if self._tracer.coarse and isinstance(result, torch.Tensor):
                whole = Rows(self._step, FORWARD, frozenset({result.shape[0]}), start, count, position)
                self._coarse(whole, result)
            return result

        return forward

    def _logits(self, held):
        traced = super()._logits(held)

        def compute_logits(hidden_states, *args, **kwargs):
            result = traced(hidden_states, *args, **kwargs)
            if self._prompt_hidden is not None:
                self._tracer.set_rows(self._logprob_rows)  # until the next chunk's logits
            return result

        return compute_logits

    def _logit_rows(self, hidden_states) -> Rows | None:
        if self._prompt_hidden is None:
            return super()._logit_rows(hidden_states)
        self._logprob_rows = None
        place, whole = self._place(), self._prompt_hidden
        if place is None:
            return None
        _, start, count, position = place
        offset = (hidden_states.data_ptr() - whole.data_ptr()) // (whole.stride(0) * whole.element_size())
        number = hidden_states.shape[0]
        low, high = max(start, offset), min(start + count, offset + number)
        if low >= high:
            return None
        where = (frozenset({number}), low - offset, high - low, position + low - start)
        self._logprob_rows = Rows(self._step, LOGPROBS, *where)
        return Rows(self._step, LOGITS, *where)

    def _sample(self, held):
        def sample(hidden_states, input_batch, *args, **kwargs):
            place = self._place()
            if place is None or place[3] + place[2] < self._tokens():
                return held(hidden_states, input_batch, *args, **kwargs)
            first, _, count, position = place
            sizes = frozenset({int(input_batch.logits_indices.shape[0])})
            rows = Rows(self._step, SAMPLE, sizes, first, 1, position + count - 1)
            self._record_seed(rows)
            with self._tracer.phase(rows):
                result = held(hidden_states, input_batch, *args, **kwargs)
            self._tracer.record("sampled token", [result[0].sampled_token_ids], rows=rows, module="sampler")
            return result

        return sample

    def _prompt_logprobs(self, held):
        def compute_prompt_logprobs(logits_fn, hidden_states, *args, **kwargs):
            self._prompt_hidden, self._logprob_rows = hidden_states, None
            try:
                with self._tracer.phase(None):
                    result = held(logits_fn, hidden_states, *args, **kwargs)
            finally:
                self._prompt_hidden = self._logprob_rows = None
            self._returned(result.get(self._target))
            return result

        return compute_prompt_logprobs

    def _seed(self) -> int | None:
        states, state = self._runner.sampler.sampling_states, int(self._batch.idx_mapping_np[self._row()])
        return int(states.seeds.np[state]) if states.temperature.np[state] else None

    def _blocks(self, full: int) -> torch.Tensor:
        state = int(self._batch.idx_mapping_np[self._row()])
        return self._runner.block_tables.block_tables[0].gpu[state, :full].clone()


def _text(new) -> list[int]:
    """The prompt's tokens of vLLM's NewRequestData, without those that stand for images."""
    tokens = list(new.prompt_token_ids or ())
    for feature in reversed(getattr(new, "mm_features", None) or ()):
        place = feature.mm_position
        del tokens[place.offset : place.offset + place.length]
    return tokens


@contextlib.contextmanager
def replaced(owner, name: str, wrap) -> Iterator[None]:
    """Within this context, `owner.name` is `wrap(owner.name)`, on this object, class or module only."""
    held = getattr(owner, name)
    own = vars(owner).get(name)
    # object's setters pass by __setattr__ of torch.nn.Module, which refuses; they do not work on classes.
    kind = type if isinstance(owner, type) else object
    kind.__setattr__(owner, name, wrap(held))
    try:
        yield
    finally:
        if own is not None:
            kind.__setattr__(owner, name, own)
        else:
            kind.__delattr__(owner, name)
