"""The integers of experts of 4 bits, packed for the bundled kernel from the layouts of vLLM's methods."""


def group(quant_config) -> int | None:
    """The elements of K that share a scale in a checkpoint of 4 bits that `pack` reads, None for another one."""
    kind, of = type(quant_config).__name__, quant_config
    size = getattr(of, "group_size", None) or -1
    known = {
        "QuantizationArgs": lambda: (
            of.num_bits == 4
            and of.type == "int"
            and of.strategy == "group"
            and of.actorder in (None, "weight", "static")  # orders that leave no trace in the checkpoint
        ),
        "AutoGPTQConfig": lambda: of.weight_bits == 4 and of.is_sym and not of.desc_act,
        "AutoAWQConfig": lambda: of.weight_bits == 4 and of.zero_point,
        "MoeWNA16Config": lambda: of.weight_bits == 4,
    }
    return size if size > 0 and kind in known and known[kind]() else None


_AT_ONCE = 1 << 27  # integers that are unpacked at once, a byte each


def pack(words, scale, zero, quant_config):
    """Experts' integers for the bundled kernel: data uint8 [E, N, K / 2], scales and zero points [E, K / group, N].

    words, scale, zero: as vLLM hands them to the conversion for a kernel, in the layout of the checkpoint's method. The
    zero points returned are None for a method without them. data has the kernel's own order (kernels/packing.py), and
    the shape of vLLM's Triton layout.
    """
    import torch

    from bi_patch.kernels import packing

    across = type(quant_config).__name__ == "AutoAWQConfig"  # K is the first dimension, and integers lie along N
    groups, n = scale.shape[1:] if across else scale.shape[:0:-1]
    k = words.shape[1] if across else words.shape[2] * words.element_size() * 2
    experts = len(words)
    if _without_zeros(quant_config):
        zero = None
    data = torch.empty((experts, n, k // 2), dtype=torch.uint8, device=words.device)
    scales = torch.empty((experts, groups, n), dtype=scale.dtype, device=words.device)
    zeros = None if zero is None else torch.empty_like(scales)
    step = max(1, _AT_ONCE // (n * k))
    for at in range(0, experts, step):
        part = slice(at, at + step)
        q, s, z = _integers(words[part], scale[part], None if zero is None else zero[part], across)
        made = packing.pack(q.flatten(0, 1), s.flatten(0, 1), None if z is None else z.flatten(0, 1), 4)
        data[part] = made.data.view(len(q), n, k // 2)
        scales[part] = made.scale.view(groups, len(q), n).transpose(0, 1)
        if zeros is not None:
            zeros[part] = made.zero.view(groups, len(q), n).transpose(0, 1)
    return data, scales, zeros


def _without_zeros(quant_config) -> bool:
    """Whether a method's zero points are 8, so that those of the checkpoint, if there are any, do not count."""
    if type(quant_config).__name__ == "QuantizationArgs":
        return quant_config.symmetric
    return {
        "AutoGPTQConfig": True,
        "AutoAWQConfig": False,
        "MoeWNA16Config": not getattr(quant_config, "has_zp", True),
    }[type(quant_config).__name__]


def _integers(words, scale, zero, across: bool):
    """q uint8 [E, N, K], scale [E, N, K / group] and zero points uint8 [E, N, K / group], or None.

    words: int32 or uint8 [E, N, K / 8 or 2], integers along K; across: int32 [E, K, N / 8], along N in AWQ's order.
    scale: [E, N, K / group]; across: [E, K / group, N]. zero: [E, N / 8 or 2, K / group], along N; across: as words.
    """
    if across:
        q, scale = _nibbles(words)[..., _AWQ].flatten(2).mT, scale.mT
        z = None if zero is None else _nibbles(zero)[..., _AWQ].flatten(2).mT
        return q.contiguous(), scale.contiguous(), z
    z = None if zero is None else _nibbles(zero.mT).flatten(2).mT
    return _nibbles(words).flatten(2), scale, z


_AWQ = [0, 4, 1, 5, 2, 6, 3, 7]  # in a word of AWQ, the places of integers 0 to 7


def _nibbles(words):
    """The integers of each word, lowest bits first: uint8 [..., 8] of int32, [..., 2] of uint8."""
    import torch

    held = words.contiguous().view(torch.uint8).view(*words.shape, -1)
    return torch.stack((held & 15, held >> 4), -1).flatten(-2)
