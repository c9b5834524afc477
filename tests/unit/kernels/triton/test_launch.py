"""A compiled kernel is launched again only where Triton would take the same one."""

import importlib.util
import itertools
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

from bi_patch.kernels.triton import drafts, launch, norm, rope
from bi_patch.kernels.triton.launch import Launcher


class Driver:
    """A Hopper GPU that launches nothing. device: the current one."""

    device = 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 70 + device

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", made)
    return made


class CompiledKernel:
    """What Triton returns from a launch. runs: the launches that did not go through Triton."""

    function, packed_metadata = 5, (4, 1, 0)

    def __init__(self):
        self.runs = []

    def run(self, *given):
        self.runs.append(given)


class Kernel:
    """A kernel of Triton. asked: the launches through Triton."""

    pre_run_hooks = ()

    def __init__(self, found):
        self.asked, self.found = [], found

    def __getitem__(self, grid):
        return lambda *given, num_warps: (self.asked.append((grid, given, num_warps)), self.found)[1]


def tensor(address=64, dtype=torch.bfloat16, device=0, is_cuda=True):
    return SimpleNamespace(
        data_ptr=lambda: address, get_device=lambda: device, dtype=dtype, is_cuda=is_cuda, address=address
    )


@pytest.fixture
def launched(driver, monkeypatch):
    monkeypatch.setattr(launch, "_known", True)
    found = CompiledKernel()
    kernel = Kernel(found)
    made = Launcher(kernel)

    def call(rows=5, *tensors, numbers=(7, 0.5), constants=(True, 8), warps=4):
        made((3, 2), tensors or (tensor(), tensor(128)), rows, numbers, constants, warps)
        return len(kernel.asked), len(found.runs)

    return SimpleNamespace(call=call, kernel=kernel, found=found, driver=driver)


def test_the_second_launch_of_a_class_goes_straight_to_the_kernel(launched):
    assert launched.call() == (1, 0)
    grid, given, warps = launched.kernel.asked[0]
    assert grid == (3, 2) and given[2:] == (5, 7, 0.5, True, 8) and warps == 4
    assert launched.call(9, tensor(256), tensor(512)) == (1, 1)
    assert launched.found.runs == [(3, 2, 1, 70, 5, (4, 1, 0), None, None, None, 256, 512, 9, 7, 0.5, True, 8)]


@pytest.mark.parametrize(
    "other",
    [
        {"rows": 1},
        {"rows": 32},
        {"numbers": (8, 0.5)},
        {"constants": (False, 8)},
        {"warps": 8},
        {"tensors": (tensor(), tensor(128, torch.float16))},
    ],
)
def test_another_class_goes_through_triton_once(launched, other):
    launched.call()
    rows, tensors = other.pop("rows", 5), other.pop("tensors", ())
    assert launched.call(rows, *tensors, **other) == (2, 0)
    assert launched.call(rows, *tensors, **other) == (2, 1)


def test_unaligned_addresses_and_long_tensors_always_go_through_triton(launched):
    for rows, tensors in ((5, (tensor(66), tensor())), (1 << 31, ())):
        launched.call()
        asked, runs = launched.call(rows, *tensors)
        assert launched.call(rows, *tensors) == (asked + 1, runs)


def test_a_hook_hears_of_every_launch(launched, monkeypatch):
    launched.call()
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    assert launched.call() == (2, 0)


def test_another_current_device_goes_through_triton(launched):
    launched.call()
    launched.driver.device = 1
    assert launched.call() == (2, 0)
    launched.driver.device = 0
    assert launched.call() == (2, 1)


@pytest.mark.parametrize("spoil", ["release", "device", "rehearsal", "hooks"])
def test_what_nobody_compared_always_goes_through_triton(launched, monkeypatch, spoil):
    tensors = ()
    if spoil == "release":
        monkeypatch.setattr(launch, "_known", False)
    elif spoil == "device":
        tensors = (tensor(is_cuda=False),)
    elif spoil == "rehearsal":
        launched.kernel.found = SimpleNamespace()
    else:
        launched.kernel.pre_run_hooks = (print,)
    for count in (1, 2, 3):
        assert launched.call(5, *tensors) == (count, 0)


def views(rows, cols, dtype):
    """Rows side by side, rows within wider ones, and rows at an address that is no multiple of 16."""
    yield torch.zeros(rows, cols, dtype=dtype)
    yield torch.zeros(rows, cols + 16, dtype=dtype)[:, :cols]
    yield torch.zeros(rows, cols + 3, dtype=dtype)[:, 1 : cols + 1]


def calls():
    """Calls of every kernel that has a Launcher: numbers of rows of each class, types, strides, with and without
    weights."""
    for rows, cols, dtype in itertools.product((1, 2, 3, 16, 17, 48), (64, 72), (torch.bfloat16, torch.float32)):
        for x, weight in itertools.product(
            views(rows, cols, dtype), (None, torch.ones(cols), torch.ones(cols + 1)[1:])
        ):
            yield lambda x=x, w=weight: norm.rms_norm(x, w, 1e-6)
            yield lambda x=x, w=weight: norm.rms_norm(x, w, 1e-5, x.contiguous(), 1.0)
            yield lambda x=x, w=weight: norm.layer_norm(x, w, w, 1e-5)
        for heads in (1, 3, 4):
            q, k = torch.zeros(rows, heads * 32, dtype=dtype), torch.zeros(rows, 32 + 32 * heads, dtype=dtype)
            at, cache = torch.zeros(rows, dtype=torch.int64), torch.zeros(8, 32)
            weights = (q[0, :32], k[0, :32])
            yield lambda q=q, k=k, at=at, cache=cache: rope.rotate(at, q, k[:, :32], cache, 32)
            yield lambda q=q, k=k, at=at, cache=cache, w=weights: rope.rotate(at, q, k, cache, 32, *w, 1e-6)
        for most in (1, 4, 15):
            drawn, edges = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows + 1, dtype=torch.int32)
            yield lambda d=drawn, e=edges, most=most: drafts.check(d, d.int(), e, most)


def test_triton_sees_no_difference_within_a_class(driver, monkeypatch):
    """Triton's own classification of the arguments is the same for all calls that share one of ours."""
    seen, wrong = {}, []

    def ask(self, key, grid, tensors, others, warps, keep):
        if not keep:
            return
        *_, binder = self.kernel.device_caches[0]
        _, specialization, options = binder(*tensors, *others, num_warps=warps)
        held = str(specialization), str(options)
        if seen.setdefault((id(self), key), held) != held:
            wrong.append((key, seen[id(self), key], held))

    monkeypatch.setattr(Launcher, "_ask", ask)
    count = 0
    for call in calls():
        call()
        count += 1
    assert not wrong
    assert 20 < len(seen) < count / 2
