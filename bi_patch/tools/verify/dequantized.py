"""The dequantized weights of a checkpoint, read from its files: what a quantized linear should multiply with.

Formats: INT8 and FP8 with a scale for each output or for a weight, FP8 in blocks of 128 x 128, and 4 bits of AWQ, GPTQ
and compressed-tensors.
vLLM's own unpacking takes no part, so a weight that vLLM unpacks wrongly shows in the comparison with fp64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where an int32 of AWQ holds each of its eight outputs


class Checkpoint:
    """The tensors of a local folder with safetensors. merged: vLLM's name of a merged layer -> the names of its parts,
    e.g. {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}. renamed: gives vLLM's name of a tensor, or None for a tensor that
    vLLM does not load."""

    def __init__(
        self, folder: str, merged: Mapping[str, list[str]], renamed: Callable[[str], str | None] = lambda name: name
    ):
        from safetensors import safe_open

        self._merged = merged
        self._files: dict[str, tuple[Path, str]] = {}  # by vLLM's name: a file, and the name there
        source = Path(folder).expanduser()
        for file in sorted(source.glob("*.safetensors")):
            with safe_open(file, "pt") as held:
                for name in held.keys():  # noqa: SIM118, no dictionary
                    known = renamed(name)
                    if known is not None:
                        self._files[known] = file, name
        config = source / "config.json"
        held = json.loads(config.read_text()) if config.is_file() else {}
        self._method = (held.get("quantization_config") or {}).get("quant_method", "")

    def weight(self, path: str, dtype: torch.dtype | None) -> torch.Tensor:
        """The weight [N, K] of vLLM's layer at `path` in fp64, rounded to `dtype` if the kernel rounds it.

        Raises KeyError if the checkpoint has no tensors of these names.
        """
        whole = torch.cat([self._part(part) for part in self._parts(path)])
        return whole if dtype is None else whole.to(dtype).double()

    def _part(self, name: str) -> torch.Tensor:
        if f"{name}.weight_packed" in self._files:
            return self._packed(name)
        if f"{name}.qweight" in self._files:
            return self._awq(name) if self._method == "awq" else self._gptq(name)
        weight = self._get(f"{name}.weight").double()
        scale = self._get(self._scale(name)).double()
        if scale.ndim == 2 and scale.shape[1] > 1 or f"{name}.weight_scale_inv" in self._files:
            n, k = weight.shape
            return weight * scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        return weight * scale.reshape(-1, 1)

    def _scale(self, name: str) -> str:
        """The name of a part's scales. Those of blocks have one of two names."""
        inverse = f"{name}.weight_scale_inv"
        return inverse if inverse in self._files else f"{name}.weight_scale"

    def static_scale(self, path: str) -> float:
        """The activations' scale of vLLM's layer at `path`: the largest of its parts. Raises KeyError as `weight`."""
        return max(float(self._get(f"{part}.input_scale").float().max()) for part in self._parts(path))

    def has_scales(self, path: str) -> bool:
        """Whether the weights of a layer at `path` have scales of 8-bit weights."""
        return any(self._scale(part) in self._files for part in self._parts(path))

    def plain(self, path: str) -> torch.Tensor:
        """The unquantized weight [N, K] of a layer at `path`, in fp64. Raises KeyError as `weight`, and if a part has
        8 bits."""
        parts = [self._get(f"{part}.weight") for part in self._parts(path)]
        if any(part.element_size() == 1 for part in parts):
            raise KeyError(f"{path}: a weight of 8 bits without a scale")
        return torch.cat(parts).double()

    def one_scale(self, path: str) -> float | None:
        """The largest of the scales of a layer at `path`, if each of its parts has one scale for its weight, else None.
        Raises KeyError as `weight`."""
        scales = [self._get(self._scale(part)).float() for part in self._parts(path)]
        return max(float(scale) for scale in scales) if all(scale.numel() == 1 for scale in scales) else None

    def _parts(self, path: str) -> list[str]:
        owner, _, name = path.rpartition(".")
        return [f"{owner}.{part}" if owner else part for part in self._merged.get(name, [name])]

    def _get(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        file, own = self._files[name]
        with safe_open(file, "pt") as held:
            return held.get_tensor(own)

    def _awq(self, name: str) -> torch.Tensor:
        q = _nibbles(self._get(f"{name}.qweight"), _AWQ_PLACES).T
        zeros = _nibbles(self._get(f"{name}.qzeros"), _AWQ_PLACES).T
        return _grouped(q, zeros, self._get(f"{name}.scales").T)

    def _gptq(self, name: str) -> torch.Tensor:
        q = _nibbles(self._get(f"{name}.qweight").T)
        scales = self._get(f"{name}.scales").T
        return _grouped(q, torch.full_like(scales, 8, dtype=torch.int64), scales)

    def _packed(self, name: str) -> torch.Tensor:
        q, scales = _nibbles(self._get(f"{name}.weight_packed")), self._get(f"{name}.weight_scale")
        zeros = torch.full_like(scales, 8, dtype=torch.int64)
        if f"{name}.weight_zero_point" in self._files:
            zeros = _nibbles(self._get(f"{name}.weight_zero_point").T).T
        return _grouped(q, zeros, scales)


def _nibbles(packed: torch.Tensor, places: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """int32 [rows, n] -> int64 [rows, 8 * n], of which the i-th of eight stands at bits 4 * places[i]."""
    wide = packed.to(torch.int64) & 0xFFFFFFFF
    return torch.stack([(wide >> (4 * place)) & 15 for place in places], -1).flatten(-2)


def _grouped(q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(q - zero) * scale. q: [N, K]. zeros, scales: [N, K/group]."""
    size = q.shape[1] // scales.shape[1]
    return (q - zeros.repeat_interleave(size, 1)).double() * scales.double().repeat_interleave(size, 1)
