"""bi_patch.ops.vector_math: MKL chooses every kernel before threads use it."""

import re
from pathlib import Path

import pytest
import torch

from bi_patch.ops import vector_math
from bi_patch.ops.cpu import machine
from bi_patch.seams.cpu import engine as cpu
from bi_patch.seams.cuda import linear as cuda
from bi_patch.training import devices

RENAMED = {"ln": "log"}  # MKL's name -> PyTorch's


def test_every_function_that_pytorch_takes_from_mkl_is_called():
    library = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    found = {name.decode().lower() for name in re.findall(rb"\0vm[sd]([A-Z][A-Za-z0-9]*)(?=\0)", library.read_bytes())}
    if not found:
        pytest.skip("this PyTorch has no MKL")
    assert {RENAMED.get(name, name) for name in found} - set(vector_math.FUNCTIONS) == set()


def test_each_function_is_called_once_in_a_process(monkeypatch):
    called = []
    monkeypatch.setattr(vector_math, "_settled", False)
    for name in vector_math.FUNCTIONS:
        monkeypatch.setattr(torch, name, lambda x, name=name: called.append((name, x.dtype, x.shape)))
    vector_math.settle()
    vector_math.settle()
    assert called == [(n, d, (1,)) for d in (torch.float32, torch.float64) for n in vector_math.FUNCTIONS]


def test_workers_and_trainers_begin_with_it(monkeypatch):
    """Each worker calls vLLM's init_batch_invariance before it builds the model's tables."""
    called = []
    monkeypatch.setattr(vector_math, "settle", lambda: called.append("settled"))

    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    monkeypatch.setattr(machine, "load_kernels", stop)
    for begin in (cpu._mode(stop), cuda._mode(stop), lambda: devices.prepare("cpu")):
        with pytest.raises(Stop):
            begin()
    assert called == 3 * ["settled"]
