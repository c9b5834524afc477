"""What the CPU kernels of recurrent layers get of a step, and which layers they cover."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cpu import recurrent


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_decodes_come_before_prompts_in_one_list_of_requests():
    meta = SimpleNamespace(
        num_decode_tokens=2,
        num_prefills=2,
        state_indices_tensor_d=ints(5, 3).unsqueeze(1),
        state_indices_tensor_p=ints(7, 8),
        query_start_loc_p=ints(0, 4, 9),
        has_initial_states_p=torch.tensor([False, True]),
    )
    spans = recurrent._spans_in_two(meta)
    assert spans.query_start.tolist() == [0, 1, 2, 6, 11] and spans.slots.tolist() == [5, 3, 7, 8]
    assert spans.fresh.tolist() == [False, False, True, False]
    meta = SimpleNamespace(num_decode_tokens=1, num_prefills=0, state_indices_tensor_d=ints(4).unsqueeze(1))
    assert recurrent._spans_in_two(meta).query_start.tolist() == [0, 1]


def test_states_of_a_gated_delta_net_start_at_zero_only_in_a_first_chunk():
    given = {"non_spec_query_start_loc": ints(0, 1, 6, 9), "non_spec_state_indices_tensor": ints(2, 9, 4)}
    step = SimpleNamespace(num_decodes=1, num_prefills=2, has_initial_state=torch.tensor([True, False, True]), **given)
    spans = recurrent._spans(step)
    assert spans.fresh.tolist() == [False, True, False] and spans.slots.tolist() == [2, 9, 4]
    step = SimpleNamespace(num_decodes=2, num_prefills=0, has_initial_state=None, **given)
    spans = recurrent._spans(step)
    assert spans.query_start.tolist() == [0, 1, 6] and not spans.fresh.any()


@pytest.fixture
def config():
    """config(layer, dtype): a configuration with one layer."""
    pytest.importorskip("vllm")

    def make(layer, dtype=torch.bfloat16, mode="align"):
        return SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context={"model.layers.0.mixer": layer}),
            model_config=SimpleNamespace(dtype=dtype),
            cache_config=SimpleNamespace(mamba_cache_mode=mode),
        )

    return make


def layer(kind, **fields):
    """A layer of a vLLM class without its __init__."""
    made = kind.__new__(kind)
    torch.nn.Module.__init__(made)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def test_only_layers_that_the_kernels_cover_are_let_in(config):
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.short_conv import ShortConv

    class Other(torch.nn.Module, MambaBase):
        def get_state_shape(self):
            return ((1, 1),)

        def get_state_dtype(self):
            return (torch.bfloat16,)

        mamba_type = None

    with pytest.raises(UnsupportedFeature, match="recurrent.cpu_layers: .*mixer: the recurrent layer Other"):
        recurrent.check(config(Other()))
    dtypes = {"get_state_dtype": lambda: (torch.bfloat16,)}
    recurrent.check(config(layer(ShortConv, L_cache=3, **dtypes)))
    with pytest.raises(UnsupportedFeature, match="a convolution over 9 tokens; 2 to 8 work"):
        recurrent.check(config(layer(ShortConv, L_cache=9, **dtypes)))
    with pytest.raises(UnsupportedFeature, match="--dtype bfloat16"):
        recurrent.check(config(layer(ShortConv, L_cache=3, **dtypes), torch.float32))
    with pytest.raises(UnsupportedFeature, match="--mamba-cache-dtype auto"):
        recurrent.check(config(layer(ShortConv, L_cache=3, get_state_dtype=lambda: (torch.float32,))))
    with pytest.raises(UnsupportedFeature, match="--mamba-cache-mode align"):
        recurrent.check(config(layer(ShortConv, L_cache=3, **dtypes), mode="all"))
    recurrent.check(config(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize(("largest", "named"), [(0.0, ""), (0.5, "decays A"), (float("nan"), "decays A")])
def test_decays_of_mamba_1_are_at_most_zero(largest, named):
    A = torch.full((4, 16), -1.0)
    A[2, 3] = largest
    held = SimpleNamespace(ssm_state_size=16, activation="silu", conv_kernel_size=4, A=A)
    said = recurrent._of_mamba1(held)
    assert said.startswith(named) and bool(said) == bool(named)


def test_new_decays_of_mamba_1_are_checked_again():
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer

    A = torch.full((4, 16), -1.0)
    model = torch.nn.ModuleDict({"mixer": layer(MambaMixer, A=A), "other": torch.nn.Linear(2, 2)})
    recurrent.check_again(model)
    A[1, 2] = 0.25
    with pytest.raises(UnsupportedFeature, match="recurrent.cpu_layers: .* mixer: decays A"):
        recurrent.check_again(model)
