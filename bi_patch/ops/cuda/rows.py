"""Row certificates: on this device, an operation gives a row the same bits for every number of rows.

They cover what serves without a certificate of another kind: norms, activations, rotary embedding, routers, logprobs
and draws. Most of these kernels sum each row alone by construction. The certificate shows that this holds on the user's
device and with the user's compiler. No other kernel can replace an operation that fails, so the engine stops.
"""

from __future__ import annotations

from pathlib import Path

from bi_patch.ops import bits, certificates
from bi_patch.ops.certificates import Certificate, Key, Tally
from bi_patch.ops.cuda import machine
from bi_patch.ops.cuda.ahead import Ahead
from bi_patch.ops.row_checks import RowCheck

_PLACES = 4
DATA = f"random rows at {_PLACES} places"


def certify(check: RowCheck, library: str, cache: Path) -> Certificate:
    """The certificate of `check`, from the folder `cache` or made now. library: the version of the kernel's library."""
    key = _key(check, library)
    return certificates.obtain(cache, key, lambda: _certify(check, key))


def rehearse(check: RowCheck, library: str, cache: Path, ahead: Ahead) -> None:
    """Compile ahead what `certify` will launch. Does nothing if `cache` has the certificate."""
    if check.indexes or certificates.load(cache, _key(check, library)) is not None:
        return

    def call():
        import torch

        most = max(check.rows)
        inputs = check.make(most, torch.Generator("cuda").manual_seed(most))
        for m in check.rows:
            check.run(*(t[:m].clone() for t in inputs))

    ahead.rehearse(call)


def _key(check: RowCheck, library: str) -> Key:
    return Key(
        check.operation,
        check.problem,
        machine.device(),
        " ".join(filter(None, (library, check.library, machine.libraries()))),
        machine.kernels_digests(),
        DATA,
    )


def _certify(check: RowCheck, key: Key) -> Certificate:
    import torch

    tally, most = Tally(list(check.rows)), max(check.rows)
    inputs = check.make(most, torch.Generator("cuda").manual_seed(most))
    want = check.run(*(t.clone() for t in inputs))
    for m in check.rows:
        for at in sorted({(most - m) * i // (_PLACES - 1) for i in range(_PLACES)}):
            got = check.run(*(t[at : at + m].clone() for t in inputs))
            for g, w in zip(got, want, strict=True):
                said = f"{m} rows: %d of {g.numel()} elements differ"
                tally.add_later(g.numel(), bits.count(g, w[at : at + m]), said.__mod__)
    return tally.certificate(key, "kept")
