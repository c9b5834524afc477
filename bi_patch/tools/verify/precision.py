"""Compares the accuracy of linears with fp64. No comparison of bits notices a low precision that every batch shares.

Every linear and the head of the loaded model multiply random rows. Each output's distance from the fp64 product must
stay below what fp32 accumulation and one rounding of the result can cause:

    |y - exact| <= ulp / 2 of the output's type at |exact|  +  LIMIT * sum |x| |w|

LIMIT is 2 ** -20: fp32 sums of up to 16,384 products stay eight times below this limit; TF32 inputs exceed it.

A quantized linear is compared with fp64 on the dequantized weight of the checkpoint's files. If its scheme rounds
activations to INT8, `exact` is the product of the rounded rows. Elements within NEAR of the middle between two integers
are zero in the data, because a kernel may round them to either. FP8 on CUDA: bi_patch.tools.verify.eighths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec

from bi_patch.tools.verify.engine import Engine, LocalEngine, Options

LIMIT = 2.0**-20
NEAR = 1e-4
ROWS = (1, 16, 257)
_COLUMNS = 4096  # outputs that are compared at most, for wide layers


class Imprecise(msgspec.Struct, frozen=True):
    """A layer's largest error. excess: the error divided by the allowed error; above 1 fails. rows: M of the error, 0
    if the loaded weight itself is too far from the checkpoint's."""

    module: str
    seam: str
    n: int
    k: int
    dtype: str
    rows: int
    excess: float


class Precision(msgspec.Struct, frozen=True):
    """The result of the comparison with fp64.

    layers, outputs: how many were compared. worst: the largest excess. failed: layers over the limit, in the model's
    order. missing: why no layer was compared, "" when layers were. unchecked: the comparison applies to this engine but
    was not made, so the run is incomplete.
    """

    layers: int
    outputs: int
    worst: float
    failed: list[Imprecise]
    missing: str = ""
    unchecked: bool = False

    def words(self) -> str:
        """One sentence."""
        if self.missing:
            return f"Products were not compared with fp64: {self.missing}."
        if not self.failed:
            return (
                f"The products of {self.layers} linears are as accurate as fp32 sums: the error against fp64 is at "
                f"most {self.worst:.3f} of the allowed error, over {self.outputs:,} outputs."
            )
        first = self.failed[0]
        return (
            f"The products of {len(self.failed)} of {self.layers} linears are NOT as accurate as fp32 sums. The first "
            f"is {first.module}, with {first.excess:.0f} times the allowed error "
            f"{f'at M={first.rows}' if first.rows else 'of its loaded weight'} (patch point {first.seam})."
        )


def none(missing: str, *, unchecked: bool) -> Precision:
    """The result when nothing was compared. missing, unchecked: see Precision."""
    return Precision(0, 0, 0.0, [], missing, unchecked)


def of(engine: Engine, *, widened: bool = False) -> Precision:
    """Measure an engine in a child process (see measure)."""
    return msgspec.msgpack.decode(engine.ask("precision", msgspec.msgpack.encode(widened)), type=Precision)


def measure(engine: LocalEngine, widened: bool = False) -> Precision:
    """Compare every linear of the engine's model with fp64. Compares nothing when the model runs in other processes.

    widened: on a GPU, also compare each linear with its weight widened to fp32, which takes memory.
    """
    import torch

    from bi_patch.tools.verify import eighths, layers, owners
    from bi_patch.tools.verify.runner import NotTraceable

    seams = owners.Owners()
    failed, worst, count, outputs = [], 0.0, 0, 0
    try:
        layers.model(engine)
    except NotTraceable as error:
        return none(str(error), unchecked=False)
    with torch.inference_mode():
        for name, layer in layers.linears(engine):
            w = layers.weight(layer)
            wide = widened and w.is_cuda and w.dtype != torch.float32
            found = max(
                (_excess(layer, held, m) for held in ((w, w.float()) if wide else (w,)) for m in ROWS),
                key=lambda pair: pair[0],
            )
            count += 1
            outputs += sum(ROWS) * w.shape[0]
            worst = max(worst, found[0])
            if found[0] > 1:
                n, k = w.shape
                dtype = str(w.dtype).removeprefix("torch.")
                seam = seams.seam(layer, name, "linear") or "linear"
                failed.append(Imprecise(name, seam, n, k, dtype, found[1], found[0]))
        missing, checkpoint = "", None
        made = engine.options.random_weights is not None  # made weights have no files to compare with
        for name, layer, scheme in () if made else layers.quantized(engine):
            try:
                checkpoint, dtype = checkpoint or _checkpoint(engine), _dtype(engine)
                if scheme in eighths.SCHEMES:
                    *found, (n, k) = eighths.compare(layer, name, scheme, checkpoint, dtype, ROWS)
                else:
                    *found, (n, k) = _compare(layer, name, scheme, checkpoint, dtype)
            except (KeyError, OSError) as error:
                missing = missing or f"the checkpoint has no tensors for {name} ({error})"
                continue
            except ValueError as error:
                missing = missing or f"the weight of {name} lies in no known way ({error})"
                continue
            count += 1
            outputs += sum(ROWS) * n
            worst = max(worst, found[0])
            if found[0] > 1:
                seam = seams.seam(layer, name, "linear") or "quantized"
                failed.append(Imprecise(name, seam, n, k, scheme, found[1], found[0]))
    if missing:
        return none(missing, unchecked=True)
    if not count:
        return none("the model has no linear that can be compared", unchecked=False)
    return Precision(count, outputs, worst, failed)


def _dtype(engine: LocalEngine):
    from bi_patch.tools.verify import layers

    return next(p.dtype for p in layers.model(engine).parameters() if p.is_floating_point() and p.ndim > 1)


def _checkpoint(engine: LocalEngine):
    from bi_patch.tools.verify import dequantized, layers

    model = layers.model(engine)
    merged = getattr(model, "packed_modules_mapping", {})
    return dequantized.Checkpoint(folder(engine.options), merged, renamed(model))


def folder(options: Options) -> str:
    """The folder with the files of an engine's model. Raises OSError if the hub's cache does not hold the model."""
    if Path(options.model).expanduser().is_dir():
        return options.model
    from huggingface_hub import snapshot_download

    given = options.extra
    return snapshot_download(
        options.model, revision=given.get("revision"), cache_dir=given.get("download_dir"), local_files_only=True
    )


def renamed(model: object) -> Callable[[str], str | None]:
    """A function that gives vLLM's name of a checkpoint's tensor, or None for a tensor that vLLM does not load. The
    parts of a merged layer keep their own names."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return lambda name: name
    if getattr(mapper, "orig_to_new_stacked", None):
        mapper = dataclasses.replace(mapper, orig_to_new_stacked={})
    return lambda name: next(iter(mapper.apply_list([name])), None)


def _compare(layer, name: str, scheme: str, checkpoint, dtype) -> tuple[float, int, tuple[int, int]]:
    """The largest error of a quantized linear, divided by the allowed error; M of this error; the weight's sizes."""
    w = checkpoint.weight(name, None if "A8" in scheme else dtype)
    scale = checkpoint.static_scale(name) if scheme.endswith(("onednn static", "cutlass static")) else None
    return *max((_quantized(layer, w, scheme, dtype, m, scale), m) for m in ROWS), w.shape


def _quantized(layer, w, scheme: str, dtype, m: int, scale: float | None = None) -> float:
    """The largest error of a quantized linear, divided by the allowed error.

    w: [N, K] in fp64. scale: of activations, None for a scale of each row: its largest absolute value over 127.
    """
    import torch

    device = next(layer.parameters()).device
    w = w.to(device)
    x = torch.randn(m, w.shape[1], generator=torch.Generator().manual_seed(m)).to(dtype).to(device)
    rounds = "A8" in scheme
    step = x.double().abs().amax(-1, keepdim=True) / 127 if scale is None else scale
    if rounds:
        x = torch.where((((x.double() / step).abs() % 1) - 0.5).abs() < NEAR, 0, x)
    bias = getattr(layer, "bias", None)
    bias = None if bias is None or getattr(layer, "skip_bias_add", False) else bias
    y = layer.quant_method.apply(layer, x, bias)[:, :_COLUMNS]
    wide = (x.double() / step).round().clamp(-128, 127) * step if rounds else x.double()
    w = w[:_COLUMNS]
    exact = wide @ w.T
    allowed = LIMIT * (wide.abs() @ w.abs().T)
    if bias is not None:
        exact = exact + bias[:_COLUMNS].double()
    return over(y, exact, allowed)


def _product(layer, x, w, bias):
    held = getattr(layer, "weight", None)
    if not w.is_cuda or held is None or held.dtype == w.dtype:
        return layer.quant_method.apply(layer, x, bias)
    import torch

    # The layer's method, with its weight widened.
    stand_in = torch.nn.Module()
    stand_in.weight = torch.nn.Parameter(w, requires_grad=False)
    return layer.quant_method.apply(stand_in, x, None if bias is None else bias.float())


def _excess(layer, w, m: int) -> tuple[float, int]:
    import torch

    generator = torch.Generator(w.device).manual_seed(m)
    x = torch.randn(m, w.shape[1], generator=generator, device=w.device).to(w.dtype)
    bias = getattr(layer, "bias", None)
    bias = None if bias is None or getattr(layer, "skip_bias_add", False) else bias
    y = _product(layer, x, w, bias)[:, :_COLUMNS]
    wide, exact_w = x.double(), w[:_COLUMNS].double()
    exact = wide @ exact_w.T
    allowed = LIMIT * (wide.abs() @ exact_w.abs().T)
    if bias is not None:
        exact = exact + bias[:_COLUMNS].double()
    return over(y, exact, allowed), m


def over(y, exact, allowed) -> float:
    """The greatest error of y, divided by the bound: `allowed` plus half a unit in the last place of y's type.

    y: floats of up to 32 bits; exact, allowed: float64; all of one shape. The result is infinite when an element is not
    finite.
    """
    import torch

    kind = torch.finfo(y.dtype)
    # exact = m * 2 ** e with 0.5 <= |m| < 1: its last place is eps * 2 ** (e - 1), and `least` for subnormal numbers.
    last = torch.ldexp(torch.full_like(exact, kind.eps), torch.frexp(exact).exponent - 1)
    least = kind.smallest_normal * kind.eps
    last = torch.where(exact == 0, least, last.clamp_min(least))
    error, bound = (y.double() - exact).abs(), allowed + last / 2
    return float(torch.nan_to_num(error / bound, nan=torch.inf, posinf=torch.inf).max())
