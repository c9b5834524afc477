"""What the CUDA kernels of recurrent layers get of a step, and which layers they refuse."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import UnsupportedFeature
from bi_patch.kernels.cuda.recurrent import Form
from bi_patch.ops.cuda import causal_conv, mamba1
from bi_patch.ops.cuda import recurrent as ops
from bi_patch.seams.cuda import recurrent

pytest.importorskip("vllm")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_more_requests_than_a_steps_kernels_take_are_refused_at_the_start():
    def config(most, hybrid=True):
        model = SimpleNamespace(is_hybrid=hybrid)
        return SimpleNamespace(model_config=model, scheduler_config=SimpleNamespace(max_num_seqs=most))

    recurrent._few_requests(config(65535))
    recurrent._few_requests(config(65536, hybrid=False))
    with pytest.raises(UnsupportedFeature, match="65535 requests at once, not 65536. Lower --max-num-seqs"):
        recurrent._few_requests(config(65536))


@pytest.fixture
def run(monkeypatch):
    """run(close, layer, meta, tensors): the arguments that the kernels get for a step of a layer."""
    from vllm import forward_context

    def step(close, layer, meta, *tensors):
        given = []
        monkeypatch.setattr(ops, "run", lambda *args: given.append(args))
        held = SimpleNamespace(attn_metadata=None if meta is None else {"layer": meta})
        monkeypatch.setattr(forward_context, "get_forward_context", lambda: held)
        close(None)(layer, *tensors)
        return given[0] if given else None

    return step


@pytest.fixture
def delta(run):
    weight = torch.zeros(768, 1, 4)
    layer = SimpleNamespace(
        prefix="layer",
        conv1d=SimpleNamespace(weight=weight),
        A_log=torch.zeros(4),
        dt_bias=torch.zeros(4).bfloat16(),
        kv_cache=("conv", "states"),
        num_k_heads=2,
        num_v_heads=4,
        head_k_dim=128,
        head_v_dim=64,
        tp_size=1,
    )
    tensors = torch.zeros(9, 768), torch.zeros(9, 4), torch.ones(9, 4), torch.zeros(9, 4, 64)
    return lambda meta: run(recurrent._core, layer, meta, *tensors)


def test_a_step_of_gated_delta_nets_brings_its_requests_in_one_list(delta):
    table = ints(5, 0, 3, 0, 7, 0, 9, 0).view(4, 2)
    meta = SimpleNamespace(
        num_prefills=2,
        num_actual_tokens=7,
        non_spec_state_indices_tensor=table[:, 0],
        non_spec_query_start_loc=ints(0, 1, 3, 7, 7),  # the last request is padding
        has_initial_state=torch.tensor([True, False, True, False]),
    )
    form, out, x, weight, bias, a, b, *_, conv, states, spans = delta(meta)
    assert form == Form(False, 128, 64, 2, 4, (True, False, False))
    assert len(out) == len(x) == len(a) == len(b) == 7 and weight.shape == (768, 4) and bias is None
    assert a.all() and not b.any() and (conv, states) == ("conv", "states")
    assert spans.starts.tolist() == [0, 1, 3, 7, 7] and spans.slots.tolist() == [5, 3, 7, 9]
    assert spans.fresh.tolist() == [0, 1, 0, 1] and spans.which.tolist() == [0, 1, 1, 2, 2, 2, 2]
    assert delta(meta)[-1] is spans  # the next layer of the step
    assert delta(None) is None


def test_a_step_of_decodes_brings_slots_alone(delta):
    table = ints(5, 1, 3, 1, 0, 1, 9, 1).view(4, 2)
    meta = SimpleNamespace(num_prefills=0, num_actual_tokens=3, non_spec_state_indices_tensor=table[:, 0])
    spans = delta(meta)[-1]
    assert spans.slots.tolist() == [5, 3, 0] and spans.slots.is_contiguous()
    assert spans.starts is spans.fresh is spans.which is None


def test_a_step_of_mamba_2_brings_decodes_before_prompts(run):
    layer = SimpleNamespace(
        prefix="layer",
        conv1d=SimpleNamespace(weight=torch.zeros(384, 1, 4), bias=torch.zeros(384)),
        A=torch.zeros(4),
        dt_bias=torch.zeros(4),
        D=torch.zeros(4).bfloat16(),
        kv_cache=("conv", "states"),
        ssm_state_size=64,
        head_dim=64,
        n_groups=1,
        num_heads=4,
        tp_size=1,
        tped_intermediate_size=256,
        tped_conv_size=384,
        tped_dt_size=4,
    )
    projected = torch.arange(8.0)[:, None] + torch.zeros(8, 644)
    meta = SimpleNamespace(
        num_decode_tokens=2,
        num_prefills=2,
        num_prefill_tokens=5,
        state_indices_tensor_d=ints(4, 0, 6, 0).view(2, 2),
        state_indices_tensor_p=ints(8, 2),
        query_start_loc_p=ints(0, 3, 5),
        has_initial_states_p=torch.tensor([False, True]),
    )
    output = torch.ones(8, 256)
    form, out, x, weight, bias, dt, b, *_, spans = run(recurrent._mamba2, layer, meta, projected, output)
    assert form == Form(True, 64, 64, 1, 4, (True, True, False)) and b is None and bias is not None
    assert out.shape == (7, 256) and x.shape == (7, 384) and dt.shape == (7, 4) and weight.shape == (384, 4)
    assert spans.slots.tolist() == [4, 6, 8, 2] and spans.starts.tolist() == [0, 1, 2, 5, 7]
    assert spans.fresh.tolist() == [0, 0, 1, 0] and spans.which.tolist() == [0, 1, 2, 2, 2, 3, 3]
    decodes = SimpleNamespace(num_decode_tokens=2, num_prefills=0, state_indices_tensor_d=ints(4, 0).view(2, 1))
    decodes.num_prefill_tokens = 0
    spans = run(recurrent._mamba2, layer, decodes, projected, output)[-1]
    assert spans.slots.tolist() == [4, 0] and spans.starts is None
    assert run(recurrent._mamba2, layer, None, projected, output) is None and not output.any()


DELTA = {
    "num_k_heads": 2,
    "num_v_heads": 4,
    "head_k_dim": 128,
    "head_v_dim": 128,
    "conv_kernel_size": 4,
    "activation": "silu",
    "tp_size": 1,
    "states": (torch.bfloat16, torch.float32),
}
MAMBA = {"ssm_state_size": 128, "head_dim": 64, "n_groups": 1, "num_heads": 8, "use_replayssm": False}


@pytest.mark.parametrize("mamba", [False, True])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"head_k_dim": 96, "ssm_state_size": 96}, "heads of 96 keys"),
        ({"conv_kernel_size": 3}, "over 3 tokens"),
        ({"activation": "gelu"}, "gelu"),
        ({"states": (torch.bfloat16, torch.bfloat16)}, "--mamba-ssm-cache-dtype float32"),
        ({"states": (torch.float32, torch.float32)}, "--mamba-cache-dtype auto"),
        ({"dtype": torch.float16}, "--dtype bfloat16"),
        ({"mode": "all"}, "--mamba-cache-mode align"),
        ({"use_replayssm": True}, "replayssm"),
        ({"tp_size": 2, "use_rms_norm": True}, "a norm over 2 ranks"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(mamba, changed, said):
    if not mamba and {"use_replayssm", "use_rms_norm"} & set(changed):
        pytest.skip("only Mamba 2 has it")
    held = DELTA | MAMBA | changed
    layer = SimpleNamespace(prefix="model.layers.0", get_state_dtype=lambda: held["states"], **held)
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=held.get("dtype", torch.bfloat16)),
        cache_config=SimpleNamespace(mamba_cache_mode=held.get("mode", "align")),
    )
    unknown = recurrent._unknown_mamba2 if mamba else recurrent._unknown_delta
    with pytest.raises(UnsupportedFeature, match=f"recurrent.cuda_states: .*layers.0.*{said}"):
        recurrent._states(None, unknown)(lambda self, config: None)(layer, config)


def test_a_slot_has_room_for_the_tokens_of_its_open_chunk():
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator as Shapes

    def both(mamba, name, *given):
        made = recurrent._kept(mamba)(vars(Shapes)[name])
        return getattr(Shapes, name)(*given), made.__func__(Shapes, *given)

    for ranks in (1, 2):
        stock, ours = both(False, "gated_delta_net_state_shape", ranks, 16, 32, 128, 128, 4)
        form = Form(False, 128, 128, 16 // ranks, 32 // ranks, (True, False, False))
        assert ours == (ops.inputs_of(form), stock[1]) and ours[0] == (9, 8192 // ranks)
    stock, ours = both(True, "mamba2_state_shape", 1, 8192, 1, 128, 64, 128, 4)
    assert ours == (ops.inputs_of(Form(True, 128, 64, 1, 128, (True, False, False))), stock[1])
    for given in ((1, 16, 32, 96, 128, 4), (1, 16, 32, 128, 128, 3), (1, 16, 32, 128, 128, 4, 2)):  # refused at start
        stock, ours = both(False, "gated_delta_net_state_shape", *given)
        assert ours == stock


def test_short_convolutions_run_between_their_projections(monkeypatch):
    from vllm import forward_context

    given = []
    monkeypatch.setattr(causal_conv, "run", lambda *args, gated: given.append((*args, gated)) or args[0][:, :4])
    layer = SimpleNamespace(
        prefix="layer",
        in_proj=lambda x: (x.repeat(1, 3), None),
        out_proj=lambda y: (2 * y, None),
        conv=SimpleNamespace(weight=torch.zeros(4, 1, 3), bias=None),
        kv_cache=("conv",),
    )
    meta = SimpleNamespace(
        num_decode_tokens=1,
        num_prefills=1,
        num_prefill_tokens=2,
        state_indices_tensor_d=ints(4, 0).view(1, 2),
        state_indices_tensor_p=ints(8),
        query_start_loc_p=ints(0, 2),
        has_initial_states_p=torch.tensor([False]),
    )
    held = SimpleNamespace(attn_metadata={"layer": meta})
    monkeypatch.setattr(forward_context, "get_forward_context", lambda: held)
    output = torch.zeros(5, 4)
    recurrent._short_conv(lambda *_: None)(layer, torch.ones(5, 4), output)
    x, weight, bias, conv, spans, gated = given[0]
    assert x.shape == (3, 12) and weight.shape == (4, 3) and bias is None and conv == "conv" and gated
    assert spans.slots.tolist() == [4, 8] and spans.starts.tolist() == [0, 1, 3] and spans.fresh.tolist() == [0, 1]
    assert output.sum(1).tolist() == [8, 8, 8, 0, 0]
    held.attn_metadata = None  # vLLM profiles
    profiled = recurrent._short_conv(lambda self, hidden_states, output: "profiled")
    assert profiled(layer, torch.ones(5, 4), output) == "profiled" and len(given) == 1


def test_mamba_1_runs_between_its_projections(monkeypatch):
    from vllm import forward_context

    given = []
    monkeypatch.setattr(causal_conv, "run", lambda *args, gated: given.append((*args, gated)) or args[0])
    monkeypatch.setattr(mamba1, "run", lambda *args: given.append(args) or args[0])
    layer = SimpleNamespace(
        prefix="layer",
        in_proj=lambda x: (torch.cat([x, 5 * x], 1), None),
        out_proj=lambda y: (2 * y, None),
        conv1d=SimpleNamespace(weight=torch.zeros(4, 1, 3), bias="bias"),
        A=torch.zeros(4, 8),
        D=torch.zeros(4).bfloat16(),
        _time_proj_bias=lambda: "dt_bias",
        _ssm_transform=lambda x: (x.T, x[:, :1], x[:, 1:2]),
        kv_cache=("conv", "states"),
    )
    meta = SimpleNamespace(num_decode_tokens=3, num_prefills=0, num_prefill_tokens=0)
    meta.state_indices_tensor_d = ints(4, 0, 7, 0, 0, 0).view(3, 2)
    monkeypatch.setattr(forward_context, "get_forward_context", lambda: SimpleNamespace(attn_metadata={"layer": meta}))
    output = torch.zeros(5, 4)
    recurrent._mamba1(lambda *_: None)(layer, torch.ones(5, 4), output)
    inputs, weight, bias, conv, spans, gated = given[0]
    assert inputs.shape == (3, 4) and weight.shape == (4, 3) and (bias, conv, gated) == ("bias", "conv", False)
    x, dt, b, c, gate, rate, skip, dt_bias, states, again = given[1]
    assert x.shape == dt.shape == (3, 4) and b.shape == c.shape == (3, 1) and gate.eq(5).all() and again is spans
    assert rate.shape == (4, 8) and skip.dtype == torch.float32 and (dt_bias, states) == ("dt_bias", "states")
    assert spans.slots.tolist() == [4, 7, 0] and spans.starts is None
    assert output.sum(1).tolist() == [8, 8, 8, 0, 0]


LAYERS = {
    "short": (recurrent._inputs_only, recurrent._unknown_short_conv, recurrent._prepare_short_conv),
    "Mamba 1": (recurrent.inputs_and_state, recurrent._unknown_mamba1, recurrent._prepare_mamba1),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"L_cache": 9, "conv_kernel_size": 9}, "over 9 tokens"),
        ({"states": (torch.float32,)}, "--dtype bfloat16"),
        ({"mode": "all"}, "--mamba-cache-mode align"),
        ({"failed": "no NVRTC"}, "did not compile: no NVRTC"),
        ({"activation": "gelu"}, "gelu"),
        ({"ssm_state_size": 24}, "24 states"),
    ],
)
def test_other_layers_that_the_kernels_do_not_compute_are_refused(monkeypatch, kind, changed, said):
    if kind == "short" and {"activation", "ssm_state_size"} & set(changed):
        pytest.skip("only Mamba 1 has it")
    dtypes, unknown, prepare = LAYERS[kind]
    held = {"L_cache": 3, "conv_kernel_size": 4, "states": dtypes(), "mode": "align", "failed": ""}
    held |= {"activation": "silu", "ssm_state_size": 16}
    monkeypatch.setattr(causal_conv, "prepare", lambda *_, gated: "")
    monkeypatch.setattr(mamba1, "prepare", lambda *_: "")

    def layer(held):
        monkeypatch.setattr(causal_conv, "prepare", lambda *_, gated: held["failed"])
        weight = SimpleNamespace(weight=torch.zeros(4, 1, 3))
        return SimpleNamespace(
            prefix="model.layers.0",
            conv=weight,
            conv1d=weight,
            cache_config=SimpleNamespace(mamba_cache_mode=held["mode"]),
            get_state_dtype=lambda: held["states"],
            **held,
        )

    get_state_shape = recurrent.shape(dtypes, unknown, prepare)(lambda _: "shape")
    assert get_state_shape(layer(held)) == "shape"
    with pytest.raises(UnsupportedFeature, match=f"recurrent.cuda_states: .*{said}"):
        get_state_shape(layer(held | changed))
