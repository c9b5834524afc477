"""Kinds of quantization schemes that share kernels. Each function tells whether a scheme is of a kind."""

from __future__ import annotations

from collections.abc import Callable

from bi_patch.platforms.schemes import CHANNEL, TENSOR, TOKEN, Scheme

GROUPS = ("32", "64", "128", CHANNEL)  # sizes with a kernel


def weight_only(scheme: Scheme, bits: int) -> bool:
    return scheme.weight == f"int{bits}" and scheme.scale in GROUPS and not scheme.activation and not scheme.online


def int4(method: str) -> Callable[[Scheme], bool]:
    """4-bit weights of one method, whose groups are in order, with the zero points that its checkpoints have."""
    zeros = {"awq": (True,), "gptq": (False,)}.get(method, (True, False))
    return lambda s: s.method == method and weight_only(s, 4) and not s.order and s.zeros in zeros


def int8(scheme: Scheme, activation: str, *, static: bool) -> bool:
    """INT8 weights, and INT8 activations whose scale belongs to the token (not static) or to the checkpoint."""
    return (
        scheme.weight == "int8"
        and scheme.scale in (CHANNEL, TENSOR)
        and not (scheme.zeros or scheme.order)
        and (scheme.activation, scheme.activation_scale, scheme.static) == ("int8", activation, static)
    )


def fp8(scheme: Scheme, scale: str, activation: str, *, static: bool = False, online: bool = False) -> bool:
    kind = (scheme.weight, scheme.scale, scheme.activation, scheme.activation_scale, scheme.static, scheme.online)
    return kind == ("fp8", scale, "fp8", activation, static, online)


def blocks(scheme: Scheme) -> bool:
    return fp8(scheme, "128x128", "128")


def mxfp4(scheme: Scheme) -> bool:
    return scheme.weight == "mxfp4"


def nvfp4(scheme: Scheme) -> bool:
    kind = (scheme.weight, scheme.scale, scheme.activation, scheme.zeros, scheme.order)
    return kind == ("nvfp4", "16", "", False, False)


def nvfp4_rows(scheme: Scheme) -> bool:
    """NVFP4 weights of a checkpoint that asks for activations in NVFP4, too."""
    kind = (scheme.weight, scheme.scale, scheme.activation, scheme.activation_scale, scheme.static)
    return kind == ("nvfp4", "16", "nvfp4", "16", True) and not (scheme.zeros or scheme.order)


def by_token(scheme: Scheme) -> bool:
    return any(fp8(scheme, scale, TOKEN) for scale in (CHANNEL, TENSOR))


def static(scheme: Scheme) -> bool:
    return any(fp8(scheme, scale, TENSOR, static=True) for scale in (CHANNEL, TENSOR))


def one_scale(scheme: Scheme) -> bool:
    return fp8(scheme, TENSOR, TENSOR, static=True)


def tool(method: str, *kinds: Callable[[Scheme], bool]) -> Callable[[Scheme], bool]:
    """Schemes of one tool's checkpoints that land on layers with a route."""
    return lambda s: s.method == method and any(kind(s) for kind in kinds)


def packed(scheme: Scheme) -> bool:
    return (weight_only(scheme, 4) or weight_only(scheme, 8) and not scheme.zeros) and not scheme.order
