"""An operator calls its function itself only where PyTorch's dispatcher would do nothing else."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bi_patch.ops import direct
from bi_patch.ops.registration import define

SCHEMA = "(Tensor x, Tensor weight, Tensor? bias, float more) -> Tensor"


def added(x, weight, bias, more):
    return x + weight + more if bias is None else x + weight + bias + more


@pytest.fixture
def operator(monkeypatch):
    define(f"test_direct{SCHEMA}", added, "CPU", lambda x, *_: torch.empty_like(x))
    made = torch.ops.bi_patch.test_direct.default
    straight = []
    run, here, kinds = made.bi_patch_call

    def counted(*args):
        straight.append(args)
        return run(*args)

    monkeypatch.setattr(made, "bi_patch_call", (counted, here, kinds))
    return made, straight


X, W = torch.ones(3), torch.full((3,), 2.0)


def test_it_goes_straight_in_inference_mode_only(operator):
    call, straight = operator
    assert torch.equal(call(X, W, None, 1.0), torch.full((3,), 4.0)) and not straight
    with torch.no_grad():
        call(X, W, None, 1.0)
    assert not straight
    with torch.inference_mode():
        got = call(X, W, X, 1.0)
        assert len(straight) == 1
        assert torch.equal(got, torch.full((3,), 5.0)) and got.is_inference()
        assert torch.equal(torch.ops.bi_patch.test_direct(X, W, X, 1.0), got)


class Listening(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(func)
        return func(*args, **(kwargs or {}))


class Asking(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.heard.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_hear_of_every_call(operator):
    call, straight = operator
    with torch.inference_mode():
        for mode in (Listening(), Asking()):
            with mode:
                call(X, W, None, 1.0)
            assert call in mode.heard
        count = len(straight)  # each mode called the operator again, without itself
        with FakeTensorMode() as fake:
            assert call(fake.from_tensor(X), fake.from_tensor(W), None, 1.0).shape == X.shape
        assert len(straight) == count == 2


def test_compiled_code_is_traced_as_before_and_goes_straight(operator):
    call, straight = operator
    compiled = torch.compile(
        lambda x, w: torch.ops.bi_patch.test_direct(x, w, None, 0.5) * 2, fullgraph=True, backend="aot_eager"
    )
    with torch.inference_mode():
        assert torch.equal(compiled(X, W), torch.full((3,), 7.0))


class Weight(torch.nn.Parameter):
    """As vLLM's parameters."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


Weight.__module__ = "vllm.model_executor.parameter"


class Other(torch.nn.Parameter):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapped(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*(a.held if isinstance(a, cls) else a for a in args), **(kwargs or {}))


def test_types_with_a_dispatch_of_their_own_take_pytorchs_way(operator):
    call, straight = operator
    with torch.inference_mode():
        for kind in (Weight, torch.nn.Parameter):
            assert torch.equal(call(X, kind(W, requires_grad=False), None, 1.0), torch.full((3,), 4.0))
        assert len(straight) == 2
        for weight in (Other(W, requires_grad=False), Wrapped(W)):
            assert not direct._is_plain(type(weight))
        call(X, Other(W, requires_grad=False), None, 1.0)
        call(X, weight=W, bias=None, more=1.0)
        assert len(straight) == 2
        meta = torch.empty(3, device="meta")
        assert call(meta, meta, None, 1.0).is_meta
        assert len(straight) == 2


def test_a_mode_of_transforms_takes_pytorchs_way(operator):
    call, straight = operator
    seen = []

    def inside(x):
        seen.append(torch._C._functorch.peek_interpreter_stack() is not None)
        return x

    with torch.inference_mode():
        torch.func.vmap(inside)(torch.ones(2, 3))
    assert seen == [True] and not straight


def test_values_that_pytorch_converts_take_its_way(operator):
    call, straight = operator
    define("test_numbers(Tensor x, float eps, int n, bool b, ScalarType dtype) -> Tensor", eps_of, "CPU", eps_of)
    numbers = torch.ops.bi_patch.test_numbers.default
    with torch.inference_mode():
        assert torch.equal(call(X, W, None, 1), torch.full((3,), 4.0)) and not straight
        assert numbers(X, 2.0, 1, True, torch.float32).item() == 2.0
        assert numbers(X, 2, 1, True, torch.float32).item() == 2.0
        with pytest.raises(RuntimeError, match="for argument .n."):
            numbers(X, 2.0, 1.5, True, torch.float32)


def eps_of(x, eps, n, b, dtype):
    assert [type(v) for v in (eps, n, b)] == [float, int, bool]
    return torch.tensor(eps)


def test_an_operator_with_a_list_is_left_alone():
    define("test_lists(Tensor x, Tensor[] more) -> Tensor", lambda x, more: x, "CPU", lambda x, more: x)
    assert type(torch.ops.bi_patch.test_lists.default) is torch._ops.OpOverload


def test_an_operator_that_writes_is_left_alone():
    define("test_writes(Tensor(a!) x) -> ()", lambda x: None, "CPU", lambda x: None)
    assert type(torch.ops.bi_patch.test_writes.default) is torch._ops.OpOverload


def test_errors_and_parameters_pass(operator):
    call, _ = operator
    with torch.inference_mode(), pytest.raises(RuntimeError, match="more"):
        call(X, W, None, None)


def test_vllm_makes_no_view_that_is_negated_later():
    """A direct call would read such a view's memory as it is (torch.conj(x).imag). The function of this view is in C++,
    so a search in vLLM's source is what can tell."""
    root = Path(find_spec("vllm").origin).parent
    found = [file for file in root.rglob("*.py") if any(word in file.read_text() for word in (".conj(", "_neg_view"))]
    assert not found
