"""MLA in two forms on CUDA: the position of a token decides its form, however a step is composed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bi_patch.arming.catalog import CATALOG
from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import active
from bi_patch.seams.cuda import mla_prompts, mla_rows, mla_steps
from bi_patch.seams.cuda.chunks import Metadata

HEADS, LATENT, ROTARY, NOPE, SIZE, PAGE = 2, 8, 4, 6, 5, 16


def closed(name, original):
    return next(seam for seam in CATALOG.seams if seam.name == name).close(original)


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(active, "mla", "two")
    monkeypatch.setattr(active, "latent", True)
    monkeypatch.setattr(mla_steps, "prompt_lengths", None)


def test_a_position_decides_into_how_many_parts_its_keys_are_split():
    assert [mla_rows.parts(keys, 16) for keys in (0, 1, 384, 385, 1920, 8192, 32000)] == [1, 1, 1, 2, 5, 13, 32]
    assert [mla_rows.parts(keys, 128) for keys in (1, 1024, 1025, 32000)] == [1, 1, 2, 32]
    for heads in (8, 16, 32, 64, 128):
        found = [mla_rows.parts(keys, heads) for keys in range(0, 300000, 61)]
        assert found == sorted(found) and found[0] == 1 and found[-1] == mla_rows.MOST
    want = [mla_rows.parts(keys, 16) for keys in range(301)]
    assert mla_rows.table(300, 16, torch.device("cpu")).tolist() == want
    assert mla_rows.most_rows(16, 512) == 992 and mla_rows.most_rows(128, 512) == 128


def test_groups_hold_at_most_the_workspace():
    segments = [mla_prompts.Segment(0, 1, keys, 0) for keys in (5, 5, 1, 30, 2, 8)]
    assert [[s.keys for s in group] for group in mla_prompts.groups(segments, 10)] == [[5, 5], [1], [30], [2, 8]]


def common(counts, ends):
    starts = np.cumsum([0, *counts]).astype(np.int32)
    return SimpleNamespace(
        query_start_loc_cpu=torch.from_numpy(starts),
        query_start_loc=torch.from_numpy(starts),
        seq_lens_cpu_upper_bound=torch.tensor(ends, dtype=torch.int32),
        seq_lens=torch.tensor(ends, dtype=torch.int32),
        num_reqs=len(counts),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(counts),
        max_seq_len=max(ends),
        slot_mapping=None,
        causal=True,
    )


def test_a_step_of_generated_rows_needs_no_lists():
    assert mla_steps.divide(common([1, 1], [9, 30]), np.array([4, 29])) == ([], [])
    assert mla_steps.divide(common([1, 1, 0, 0], [9, 30, 0, 0]), np.array([4, 29])) == ([], []), "padded for a graph"
    assert mla_steps.divide(common([1, 1], [1, 1]), None) == ([], []), "a dummy step"


def test_the_last_token_of_a_prompt_is_a_prompt_row():
    rows, segments = mla_steps.divide(common([1, 1], [9, 30]), np.array([4, 30]))
    assert rows == [(0, 0, 9)] and segments == [mla_prompts.Segment(1, 1, 30, 1)]


def test_a_chunk_over_the_end_of_the_prompt_is_cut_there():
    rows, segments = mla_steps.divide(common([5], [12]), np.array([9]))
    assert segments == [mla_prompts.Segment(0, 2, 9, 0)]
    assert rows == [(2, 0, 10), (3, 0, 11), (4, 0, 12)]


def test_an_unknown_request_is_an_error():
    with pytest.raises(UnsupportedFeature, match="mla.cuda_forms: a step of 2 requests, of which 1 are known"):
        mla_steps.divide(common([1, 1], [9, 30]), np.array([4]))


def test_each_row_takes_the_form_of_its_position(two, monkeypatch):
    """Random steps, by a layer whose two forms differ in a sign. Each row depends on its own keys only."""
    monkeypatch.setattr("vllm.utils.torch_utils.async_tensor_h2d", _to_device, raising=False)
    monkeypatch.setattr(mla_prompts, "_gather", _gather)
    monkeypatch.setattr(mla_prompts, "_flash", _flash)
    generator = torch.Generator().manual_seed(3)
    draw = np.random.default_rng(3)
    pages = 40
    cache = torch.randn((pages, PAGE, LATENT + ROTARY), generator=generator, dtype=torch.float64)
    up = torch.randn((HEADS * (NOPE + SIZE), LATENT), generator=generator, dtype=torch.float64)
    impl = SimpleNamespace(
        num_heads=HEADS, kv_lora_rank=LATENT, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROTARY, v_head_dim=SIZE,
        kv_b_proj=lambda x: (x @ up.T, None), _concat_k_nope_k_pe=_join, scale=0.3, kv_cache_dtype="auto",
    )  # fmt: skip

    def latents(table, keys):
        return cache[table.long()].flatten(0, 1)[:keys]

    def expanded(query, table, keys):
        low = latents(table, keys)
        both = (low[:, :LATENT] @ up.T).view(keys, HEADS, NOPE + SIZE)
        key = torch.cat([both[..., :NOPE], low[:, None, LATENT:].expand(-1, HEADS, -1)], -1)
        scores = torch.einsum("hd,thd->ht", query, key) * 0.3
        return torch.einsum("ht,thd->hd", scores.softmax(-1), both[..., NOPE:]).flatten()

    def absorbed(layer, q, held, metadata, output):
        step = metadata.decode
        for row, (table, keys) in enumerate(zip(step.block_table, step.seq_lens.tolist(), strict=True)):
            output[row] = -expanded(q[row], table, keys)

    class Rows:
        def make(self, table, lengths, longest):
            return Metadata(block_table=table, seq_lens=lengths)

    builder = SimpleNamespace(
        bi_patch_rows=Rows(), device="cpu", metadata_cls=SimpleNamespace,
        chunked_prefill_workspace=torch.zeros((40, LATENT + ROTARY), dtype=torch.float64),
        model_config=SimpleNamespace(get_head_size=lambda: LATENT + ROTARY),
    )  # fmt: skip
    monkeypatch.setattr(mla_rows, "generate", absorbed)
    build = closed("mla.cuda_build", lambda *given: "all generated")
    forward = closed("mla.cuda_forward", None)
    for _ in range(40):
        requests = int(draw.integers(1, 6))
        counts = [int(draw.choice([1, 1, 1, 2, 7, 20])) for _ in range(requests)]
        ends = [count + int(draw.integers(0, 60)) for count in counts]
        prompts = np.array([max(1, end - int(draw.integers(-10, 25))) for end in ends])
        step = common(counts, ends)
        step.block_table_tensor = torch.from_numpy(draw.integers(0, pages, (requests, 6)).astype(np.int32))
        monkeypatch.setattr(mla_steps, "prompt_lengths", prompts)
        made = build(builder, 0, step)
        q = torch.randn((sum(counts) + 3, HEADS, NOPE + ROTARY), generator=generator, dtype=torch.float64)
        want = torch.zeros((len(q), HEADS * SIZE), dtype=torch.float64)
        new = torch.zeros((len(q), LATENT + ROTARY), dtype=torch.float64)
        first, generated = 0, 0
        for request, (count, end) in enumerate(zip(counts, ends, strict=True)):
            table = step.block_table_tensor[request]
            new[first : first + count] = latents(table, end)[end - count :]
            for row in range(count):
                position = end - count + row
                sign = 1 if position < prompts[request] else -1
                generated += sign < 0
                want[first + row] = sign * expanded(q[first + row], table, position + 1)
            first += count
        if made == "all generated":
            assert generated == sum(counts) and max(counts) == 1
            continue
        got = torch.zeros_like(want)
        layer = SimpleNamespace(impl=impl)
        assert forward(layer, q, new[:, :LATENT], new[:, None, LATENT:], cache, made, got) is got
        torch.testing.assert_close(got, want)
        with pytest.raises(UnsupportedFeature, match="quantized outputs"):
            forward(layer, q, None, None, cache, made, got, output_scale=torch.ones(1))


def _to_device(data, device=None, dtype=None):
    return torch.tensor(data, dtype=dtype)


def _join(nope, pe):
    return torch.cat([nope, pe.expand(-1, nope.shape[1], -1)], -1)


def _gather(impl, cache, workspace, block_table, starts, sequences, first=None):
    rows, place = [], {}
    for sequence in sequences.tolist():
        at = place.setdefault(sequence, 0 if first is None else int(first[sequence]))
        page = block_table[sequence, at // PAGE].long()
        rows.append(cache[page, at % PAGE])
        place[sequence] += 1
    held = torch.stack(rows)
    return held[:, :LATENT], held[:, None, LATENT:]


def _flash(impl, q, key, value, group, out):
    assert group.longest_query >= 128
    starts, keys = group.starts.tolist(), group.key_starts.tolist()
    for number in range(group.count):
        k, v = key[keys[number] : keys[number + 1]], value[keys[number] : keys[number + 1]]
        rows = range(starts[number], starts[number + 1])
        for place, row in enumerate(rows):
            seen = len(k) - len(rows) + place + 1
            scores = torch.einsum("hd,thd->ht", q[row], k[:seen]) * impl.scale
            out[row] = torch.einsum("ht,thd->hd", scores.softmax(-1), v[:seen])


def test_a_cached_block_with_generated_tokens_is_keyed_by_the_prompt_length(two, monkeypatch):
    keys = closed("mla.cuda_keys", lambda request, start, end: ["other"])
    request = SimpleNamespace(num_prompt_tokens=40)
    assert keys(request, 16, 32) == ["other"]
    assert keys(request, 32, 48) == ["other", ("bi_patch_prompt", 40)]
    assert keys(request, 48, 64) == ["other", ("bi_patch_prompt", 40)]
    monkeypatch.setattr(active, "mla", "one")
    assert keys(request, 48, 64) == ["other"]


def test_a_step_with_prompt_rows_runs_no_graph_of_decode_steps(two):
    from typing import NamedTuple

    class State(NamedTuple):
        idx_mapping_np: np.ndarray
        num_computed_prefill_tokens_np: np.ndarray
        decode_graph_eligible: bool = True

    runner = SimpleNamespace(req_states=SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([7, 20, 9]))))
    step = closed("mla.cuda_step", lambda self, output, dummy: (output, 1))
    state, uniform = step(runner, State(np.array([2, 1]), np.array([9, 20])), False)
    assert uniform == 1 and state.decode_graph_eligible and mla_steps.prompt_lengths.tolist() == [9, 20]
    state, uniform = step(runner, State(np.array([2, 1]), np.array([9, 19])), False)
    assert uniform is None and not state.decode_graph_eligible
    assert step(runner, None, True) == (None, 1) and mla_steps.prompt_lengths is None


def test_model_runner_v1_says_which_rows_are_a_prompt(two):
    """A step with prompt rows runs no graph of decode steps, and a dummy step has no prompt lengths."""
    asked = []
    step = closed(
        "mla.cuda_step_v1",
        lambda self, tokens, reqs, force_uniform_decode=None, **_: asked.append(force_uniform_decode),
    )
    batch = SimpleNamespace(num_prompt_tokens=np.array([7, 20, 9]), num_computed_tokens_cpu=np.array([7, 20, 3]))
    runner = SimpleNamespace(input_batch=batch)
    step(runner, num_tokens=2, num_reqs=2, max_num_scheduled_tokens=1)
    assert asked == [None] and mla_steps.prompt_lengths.tolist() == [7, 20]
    step(runner, num_tokens=3, num_reqs=3, max_num_scheduled_tokens=1)
    assert asked[1:] == [False] and mla_steps.prompt_lengths.tolist() == [7, 20, 9]
    batch.num_prompt_tokens[0] = (
        1  # the batch changes before the step is built no more, but a later one's lengths differ
    )
    assert mla_steps.prompt_lengths[0] == 7
    for forced in (True, False):
        step(runner, num_tokens=3, num_reqs=3, force_uniform_decode=forced)
        assert asked[-1] is forced and mla_steps.prompt_lengths is None


def test_a_captured_step_knows_no_prompt_of_the_warm_up(two, monkeypatch):
    """vLLM's warm-up runs steps with real requests before it captures graphs of dummy steps."""
    monkeypatch.setattr(mla_steps, "prompt_lengths", np.array([3, 4]))
    seen = []
    capture = closed(
        "mla.cuda_capture", lambda self, *given, **named: seen.append((mla_steps.prompt_lengths, given, named))
    )
    capture("manager", "make", progress_bar_desc="words")
    assert seen == [(None, ("make",), {"progress_bar_desc": "words"})]


@pytest.mark.parametrize(("micro", "said"), [(True, "micro-batches"), (False, None)])
def test_what_has_one_form_only_is_refused(two, micro, said):
    config = SimpleNamespace(
        model_config=SimpleNamespace(use_mla=True), parallel_config=SimpleNamespace(use_ubatching=micro)
    )
    (policy,) = (p for p in CATALOG.policies if p.name == "mla.cuda_forms")
    if said is None:
        policy.apply(config)
    else:
        with pytest.raises(UnsupportedFeature, match=f"mla.cuda_forms: .*{said}.*BI_PATCH_MLA=one"):
            policy.apply(config)


def test_graphs_read_schedules_that_stay_where_they_are(monkeypatch):
    """A captured graph holds the addresses of a step's schedule. Each later step writes its own numbers there."""
    monkeypatch.setattr(mla_rows.Rows, "theirs", _theirs)
    monkeypatch.setattr(mla_rows, "most_rows", lambda heads, latent: 4)
    rows = mla_rows.Rows(2, LATENT, ROTARY, PAGE, torch.float32, torch.device("cpu"), 4000, 10)
    table = torch.zeros((10, 3), dtype=torch.int32)

    def parts(step, lengths):
        found = []
        for one, first in zip((step, *step.more), range(0, 10, 4)):
            some = lengths[first : first + 4]
            order = one.scheduler_metadata[8 : 8 + len(some)].tolist()
            assert sorted(order) == list(range(len(some)))
            at = dict(zip(order, one.scheduler_metadata[4 : 4 + len(some)].tolist(), strict=True))
            found += [at[place] for place in range(len(some))]
        return found

    captured, lengths = None, torch.tensor([1, 500, 3000, 64, 0, 900, 20, 4000, 2, 700], dtype=torch.int32)
    for shift in (0, 3, 7):
        some = lengths.roll(shift)
        step = rows.make(table, some, 4000)
        assert [len(one.seq_lens) for one in (step, *step.more)] == [4, 4, 2]
        assert parts(step, some) == [mla_rows.parts(keys, 2) for keys in some.tolist()]
        where = [one.scheduler_metadata.data_ptr() for one in (step, *step.more)]
        captured = captured or where
        assert where == captured and len(set(where)) == 3


def _theirs(self, seq_lens, longest):
    """FlashAttention's schedule of up to 4 sequences, the longest first: lengths, parts, places; and a counter."""
    order = seq_lens.argsort(descending=True)
    made = torch.zeros(13, dtype=torch.int32)
    made[: len(order)], made[4 : 4 + len(order)], made[8 : 8 + len(order)] = seq_lens[order], 99, order
    return made


@pytest.mark.parametrize(("scale", "refused"), [(1.0, False), (0.5, True)])
def test_an_fp8_cache_needs_scales_of_one(two, scale, refused):
    """And each form has a certificate that names the cache's type."""
    from bi_patch.seams.cuda import chunks

    class MLAAttention(SimpleNamespace):
        pass

    layer = MLAAttention(
        attn_backend=SimpleNamespace(get_name=lambda: "TRITON_MLA"), num_heads=16, head_size=576, qk_nope_head_dim=128,
        qk_rope_head_dim=64, kv_cache_dtype="fp8", _k_scale=torch.tensor(scale),
    )  # fmt: skip
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"attn": layer}),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
    )
    if refused:
        with pytest.raises(UnsupportedFeature, match="mla.cuda: .*a scale of 1 only"):
            list(chunks._latent(config, 16))
        return
    found = [problem for problem, _ in chunks._latent(config, 16)]
    assert [problem.extras for problem in found] == ["rows e4m3 KV", "prompts e4m3 KV"]
    assert {problem.head_size for problem in found} == {192}


def test_a_chunk_reads_its_own_latents_of_an_fp8_cache_back(two, monkeypatch):
    """A later chunk will see rounded latents, so the first one must see them, too."""
    seen = []
    monkeypatch.setattr(mla_prompts, "_gather", lambda *given: seen.append("gathered") or (None, None))
    monkeypatch.setattr(mla_prompts, "_project", lambda impl, low, turned: (None, None))
    monkeypatch.setattr(mla_prompts, "_flash", lambda *given: None)
    group = SimpleNamespace(
        rows=slice(0, 3), long=False, fresh=True, workspace=None, block_table=None, key_starts=None, sequences=None
    )
    for dtype in ("auto", "fp8"):
        impl = SimpleNamespace(num_heads=2, v_head_dim=4, kv_cache_dtype=dtype)
        mla_prompts.attend(
            impl, torch.zeros(3, 2, 4), torch.zeros(3, 8), torch.zeros(3, 1, 4), None, group, torch.zeros(3, 8)
        )
    assert seen == ["gathered"]
