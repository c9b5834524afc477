"""The certificates of a CPU worker. All are made when the model is loaded, except those of linears.

`certify` runs once the model is loaded and certifies norms, experts and sampling. No bundled kernel can replace these
operations, so a failure stops the engine. `certify_linear` runs while vLLM packs a layer's weight, because the
certificate decides which packed form of the weight is kept. If linears were certified at the end, every weight would be
in memory twice: packed by the library and packed by bi_patch. If a linear's certificate fails, the bundled GEMM serves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bi_patch.ops import certificates
from bi_patch.ops.certificates import Certificate, Key
from bi_patch.ops.cpu import machine, rows


def certify(cache: Path, library: str) -> list[Certificate]:
    """Certify every operation that was registered with `rows`.

    cache: the folder of certificates and built kernels. library: the version of vLLM, whose kernels are certified, e.g.
    "vllm 0.33.0". Raises CertificateFailed, which names each operation that failed. Raises CertificateFailed also if
    the bundled kernels cannot be built.
    """
    import torch

    with certificates.clock("kernels"):
        machine.load_kernels(cache)
    made = []
    with certificates.clock("other"), torch.inference_mode():
        for check in rows.take_registered():
            key = rows.key(check, library)
            made.append(certificates.obtain(cache, key, lambda c=check, k=key: rows.certificate(c, k)))
    certificates.require(made)
    return made


def certify_linear(cache: Path, key: Key, make: Callable[[], Certificate]) -> Certificate:
    """The certificate of one linear, from disk or by `make`. The caller is packing the linear's weight."""
    return certificates.obtain(cache, key, make, instead="the bundled GEMM")
