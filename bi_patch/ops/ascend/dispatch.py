"""The dispatcher's table on Ascend: which operators bi_patch serves, which keep their native kernel, which it refuses.

bi_patch replaces an operator where PyTorch dispatches it. Every spelling of a call therefore reaches the same code: a
torch function, a method, a torch_npu function, torch.ops, functional or `.out`. An operator that sums and is not served
raises an error with the operator's name. A vendor's operator that no list here names is refused too, if its name
suggests a sum. So no native kernel runs whose order may depend on the batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from bi_patch.ops.ascend import activation, attention, forms, machine, moe, norm, products, reductions

if TYPE_CHECKING:
    import torch

KEY = "PrivateUse1"
# torch_npu registers some kernels here, above the backend's own key.
_ABOVE = "AutogradPrivateUse1"

SERVED: dict[str, Callable] = {
    "aten::mm": products.mm,
    "aten::mm.out": forms.out_form(products.mm),
    "aten::addmm": products.addmm,
    "aten::addmm.out": forms.out_form(products.addmm),
    "aten::addmm_": forms.in_place(products.addmm),
    "aten::bmm": products.bmm,
    "aten::bmm.out": forms.out_form(products.bmm),
    "aten::baddbmm": products.baddbmm,
    "aten::baddbmm.out": forms.out_form(products.baddbmm),
    "aten::baddbmm_": forms.in_place(products.baddbmm),
    "aten::mv": products.mv,
    "aten::dot": products.dot,
    "aten::linear": products.linear,
    "aten::matmul": products.matmul,
    "aten::matmul.out": forms.out_form(products.matmul),
    "aten::sum": reductions.sum_all,
    "aten::sum.dim_IntList": reductions.sum_dim,
    "aten::sum.IntList_out": forms.out_form(reductions.sum_dim),
    "aten::mean": reductions.mean_all,
    "aten::mean.dim": reductions.mean_dim,
    "aten::mean.out": forms.out_form(reductions.mean_dim),
    "aten::softmax.int": reductions.softmax_int,
    "aten::_softmax": reductions.softmax_half,
    "aten::_softmax.out": forms.out_form(reductions.softmax_half),
    "aten::log_softmax.int": reductions.log_softmax_int,
    "aten::_log_softmax": reductions.log_softmax_half,
    "aten::_log_softmax.out": forms.out_form(reductions.log_softmax_half),
    "aten::cumsum": reductions.cumsum,
    "aten::cumsum.out": forms.out_form(reductions.cumsum),
    "aten::topk": reductions.topk,
    "aten::topk.values": forms.named_out_form(reductions.topk, ("values", "indices")),
    "aten::sort": reductions.sort,
    "npu::npu_linear": products.npu_linear,
    "npu::npu_rms_norm": norm.npu_rms_norm,
    "npu::npu_add_rms_norm": norm.npu_add_rms_norm,
    "npu::npu_gemma_rms_norm": norm.npu_gemma_rms_norm,
    "npu::npu_swiglu": activation.npu_swiglu,
    "npu::npu_grouped_matmul": moe.npu_grouped_matmul,
    "npu::npu_moe_token_unpermute": moe.npu_moe_token_unpermute,
    "npu::npu_fused_infer_attention_score": attention.fused_attention,
    "npu::npu_fused_infer_attention_score.out": forms.out_form(attention.fused_attention, 2),
    "npu::npu_fused_infer_attention_score_v2": attention.fused_attention_v2,
    "npu::npu_fused_infer_attention_score_v2.out": forms.out_form(attention.fused_attention_v2, 2),
}
# PyTorch's other sums of floating-point numbers. Sums of integers are exact in any order and keep the native kernel.
_REFUSED_ATEN = (
    "addbmm",
    "addbmm.out",
    "addbmm_",
    "addmv",
    "addmv.out",
    "addmv_",
    "vdot",
    "addr",
    "nansum",
    "prod",
    "prod.dim_int",
    "logsumexp",
    "logcumsumexp",
    "norm.ScalarOpt_dim",
    "norm.ScalarOpt_dim_dtype",
    "norm.Scalar",
    "linalg_vector_norm",
    "var.correction",
    "std.correction",
    "var_mean.correction",
    "native_layer_norm",
    "native_group_norm",
    "native_batch_norm",
    "cumprod",
    "index_add",
    "index_add_",
    "scatter_add",
    "scatter_add_",
    "convolution_overrideable",
    "_thnn_fused_lstm_cell",
    "scaled_dot_product_attention",
    "cdist",
    "trace",
)
# Families of vendor operators that sum, or choose experts, in an order of their own.
_SUMMING = re.compile(
    r"attention|matmul|_mm|mm_|bmm|gmm|linear|norm|softmax|moe|quant|reduce|ffn|mla|conv|lstm|gru|"
    r"cross_entropy|top_k|indexer|logsumexp|rotary|rope|swiglu|geglu"
)
_VENDORS = ("npu", "atb", "_C_ascend")
# Operators of these families that only move rows or only prepare a call. They keep the native kernel.
KEPT = frozenset(
    {
        "npu::npu_moe_init_routing_v2",
        "npu::npu_moe_init_routing",
        "npu::npu_moe_token_permute",
        "npu::npu_moe_compute_expert_tokens",
        "npu::_npu_fused_infer_attention_score_get_max_workspace",
        "npu::_npu_fused_infer_attention_score_v2_get_max_workspace",
        "npu::npu_convert_weight_to_int4pack",
    }
)

_installed: list[torch.library.Library] = []


def refused() -> list[str]:
    """The full names of this process's operators whose native NPU kernel must not run."""
    import torch

    names = {name for name in (f"aten::{n}" for n in _REFUSED_ATEN) if _native(name)}
    for name in torch._C._dispatch_get_all_op_names():
        space, _, rest = name.partition("::")
        if space in _VENDORS and _SUMMING.search(rest) and "backward" not in rest and name not in KEPT:
            names.add(name)
    return sorted(n for n in names - SERVED.keys() if _native(n))


def install() -> None:
    """Replace this process's native kernels. A second call does nothing.

    Raises MissingDependency for a library that is missing or of an unknown version, UnsupportedDevice for an unknown
    chip, and UnsupportedFeature for an operator that torch_npu does not define.
    """
    import torch

    if _installed:  # holds the libraries: PyTorch puts the native kernels back when a library is freed
        return
    machine.require()
    machine.chip()
    machine.ascendc()
    libraries = {space: torch.library.Library(space, "IMPL") for space in ("aten", *_VENDORS)}
    for name, function in SERVED.items():
        if not _defined(name):
            forms.refuse(name, "this torch_npu does not define it")
        serve = _exact(name, function) if name in _EXACT_FOR_INTEGERS else function
        _replace(libraries, name, serve, KEY)
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, _ABOVE):
            _replace(libraries, name, _below(name), _ABOVE)
    for name in refused():
        _replace(libraries, name, _exact(name, _refusal(name)), KEY)
    _installed.extend(libraries.values())


def uninstall() -> None:
    """Put the native kernels back. Tests call this."""
    for library in _installed:
        library._destroy()
    _installed.clear()


# Sums of integers are exact in any order.
_EXACT_FOR_INTEGERS = frozenset(n for n in SERVED if n.startswith(("aten::sum", "aten::cumsum")))


def _exact(name: str, function: Callable) -> Callable:
    """An implementation that calls `function` for floating-point numbers and the native kernel for integers."""
    import torch

    if not _native(name):
        return function
    native = torch.library.get_kernel(name, KEY)

    def serve(keys, *args, **kwargs):
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        floats = any(t.is_floating_point() or t.is_complex() for t in tensors)
        dtype = kwargs.get("dtype")
        if tensors and not floats and not (dtype is not None and dtype.is_floating_point):
            return native.call_boxed(keys, *args, **kwargs)
        return function(*args, **kwargs)

    serve.with_keyset = True
    return serve


def _refusal(name: str) -> Callable:
    def refuse(*args, **kwargs):
        forms.refuse(name, "its native kernel may sum in an order that depends on the batch")

    return refuse


def _replace(libraries: dict, name: str, function: Callable, key: str) -> None:
    import warnings

    space, _, rest = name.partition("::")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that a kernel is replaced
        libraries[space].impl(rest, function, key, with_keyset=getattr(function, "with_keyset", False))


def _below(name: str) -> Callable:
    """A function that dispatches the operator again, below autograd: to this backend's kernel, or to the fake kernel
    while a graph is traced."""
    import torch

    space, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    operator = getattr(getattr(getattr(torch.ops, space), packet), overload or "default")

    def again(*args, **kwargs):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args, **kwargs)

    return again


def _defined(name: str) -> bool:
    import torch

    return torch._C._dispatch_has_kernel(name)


def _native(name: str) -> bool:
    """Whether this process has an NPU kernel for the operator."""
    import torch

    return _defined(name) and torch._C._dispatch_has_kernel_for_dispatch_key(name, KEY)
