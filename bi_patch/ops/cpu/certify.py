"""The certificates of a CPU worker: one moment for all of them but those of linears.

`certify` runs when the model is loaded, for norms, experts and sampling. They have no bundled kernel to fall back to:
a failure stops the engine. `certify_linear` runs while vLLM packs a layer's weight, because the certificate decides
which packed form of the weight is kept. Made at the end, certificates would find every weight in memory twice, packed
by the library and by us. Where a linear's certificate fails, the bundled GEMM serves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bi_patch.ops import certificates
from bi_patch.ops.certificates import Certificate, Key
from bi_patch.ops.cpu import machine, rows


def certify(cache: Path, library: str) -> list[Certificate]:
    """Certify everything that was registered with `rows`.

    cache: where certificates and built kernels are kept. library: the version of vLLM, whose kernels are certified.
    Raises CertificateFailed, naming each operation that failed, and where the bundled kernels cannot be built.
    """
    import torch

    machine.load_kernels(cache)
    made = []
    with torch.inference_mode():
        for check in rows.take_registered():
            key = rows.key(check, library)
            made.append(certificates.obtain(cache, key, lambda c=check, k=key: rows.certificate(c, k)))
    certificates.require(made)
    return made


def certify_linear(cache: Path, key: Key, make: Callable[[], Certificate]) -> Certificate:
    """The certificate of one linear, from disk or by `make`, while its weight is packed."""
    return certificates.obtain(cache, key, make, instead="the bundled GEMM")
