"""Fakes that vLLM-Ascend needs, beside torch_npu, to start on a machine without an NPU.

They are modules that compute nothing, and a Triton driver that reports the chip's cores. Kernels run in Triton's
interpreter.
"""

import importlib.machinery
import sys
import types
from unittest.mock import MagicMock

MODULES = (
    "acl",
    "acl.rt",
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.io",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2.functional",
)


def modules() -> None:
    """Replace MODULES by empty modules. Call this before vLLM-Ascend is imported."""
    for name in MODULES:
        module = MagicMock()
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__version__, module.__path__, module.__name__ = "0.0", [], name
        sys.modules[name] = module


class _Driver:
    """The part of triton-ascend's driver that vLLM-Ascend calls, for a 910B3."""

    utils = types.SimpleNamespace(get_device_properties=lambda device: {"num_aicore": 20, "num_vectorcore": 40})

    def get_benchmarker(self) -> None:
        return None

    def get_current_device(self) -> int:
        return 0


def triton_driver() -> None:
    """Make vLLM find one active Triton driver, as with CANN. Call this before vLLM is imported."""
    import triton
    from triton.backends import backends

    backends["ascend"].driver.is_active = classmethod(lambda cls: True)
    triton.runtime.driver.set_active(_Driver())
