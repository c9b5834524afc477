"""What the CUDA kernels of gated delta nets get of a step, and which states they keep."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops.cuda import recurrent as ops
from bi_patch.seams.cuda import recurrent

pytest.importorskip("vllm")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def run(monkeypatch):
    """run(meta): the arguments that the kernels get for a step of a layer with 2 heads of keys."""
    from vllm import forward_context

    layer = SimpleNamespace(
        prefix="layer",
        conv1d=SimpleNamespace(weight=torch.zeros(12, 1, 4)),
        A_log=None,
        dt_bias=None,
        kv_cache=("conv", "states"),
        num_k_heads=2,
        tp_size=1,
    )

    def step(meta):
        given = []
        monkeypatch.setattr(ops, "gated_delta_net", lambda *args: given.append(args))
        held = SimpleNamespace(attn_metadata=None if meta is None else {"layer": meta})
        monkeypatch.setattr(forward_context, "get_forward_context", lambda: held)
        recurrent._core(None)(layer, torch.zeros(9, 12), torch.zeros(9, 4), torch.ones(9, 4), torch.zeros(9, 4, 3))
        return given[0] if given else None

    return step


def test_a_step_brings_its_requests_in_one_list(run):
    table = ints(5, 0, 3, 0, 7, 0).view(3, 2)
    meta = SimpleNamespace(
        num_actual_tokens=7,
        non_spec_state_indices_tensor=table[:, 0],
        non_spec_query_start_loc=ints(0, 1, 3, 7, 7),
        has_initial_state=torch.tensor([True, False, True]),
    )
    out, x, weight, a, b, *_, conv, states, starts, slots, fresh, heads = run(meta)
    assert len(out) == len(x) == len(a) == len(b) == 7 and weight.shape == (12, 4) and heads == 2
    assert a.all() and not b.any() and (conv, states) == ("conv", "states")
    assert starts.tolist() == [0, 1, 3, 7] and slots.tolist() == [5, 3, 7] and slots.is_contiguous()
    assert fresh.tolist() == [False, True, False]
    meta.has_initial_state = None
    assert run(meta)[-2] is None and run(None) is None


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)], ids=["state", "inputs"]
)
def test_states_that_would_be_rounded_are_refused(dtypes):
    sizes = {"head_k_dim": 128, "head_v_dim": 128, "conv_kernel_size": 4, "activation": "silu"}
    layer = SimpleNamespace(prefix="model.layers.0", get_state_dtype=lambda: dtypes, **sizes)
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
    with pytest.raises(UnsupportedFeature, match="recurrent.cuda_states: .*layers.0.*--mamba-ssm-cache-dtype float32"):
        recurrent._checkpoints(lambda self, config: None)(layer, config)


@pytest.mark.parametrize(
    ("changed", "said"), [({"head_k_dim": 96}, "heads of 96 keys"), ({"conv_kernel_size": 3}, "over 3 tokens")]
)
def test_other_sizes_are_refused(changed, said):
    sizes = {"head_k_dim": 128, "head_v_dim": 128, "conv_kernel_size": 4, "activation": "silu"} | changed
    layer = SimpleNamespace(prefix="model.layers.0", **sizes)
    with pytest.raises(UnsupportedFeature, match=said):
        recurrent._checkpoints(lambda self, config: None)(layer, None)
