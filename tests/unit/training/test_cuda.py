"""On which GPUs the trainer runs. No GPU is needed."""

import pytest

from bi_patch.errors import UnsupportedDevice
from bi_patch.ops.cuda import machine
from bi_patch.training import cuda
from bi_patch.training.cuda import linear, vllm_kernels


def test_other_gpus_than_those_of_the_measured_kernels_are_refused(monkeypatch, tmp_path):
    """The same question as for the sampler's kernels."""
    done = []
    monkeypatch.setattr(linear, "certificates_in", done.append)
    monkeypatch.setattr(vllm_kernels, "load", lambda: done.append("vllm"))
    monkeypatch.setattr(machine, "is_hopper", lambda: False)
    with pytest.raises(UnsupportedDevice, match="trains on Hopper GPUs"):
        cuda.prepare(tmp_path)
    assert not done
    monkeypatch.setattr(machine, "is_hopper", lambda: True)
    cuda.prepare(tmp_path)
    assert done == [tmp_path, "vllm"]
