"""The same as recurrent_times.py for the kernels in chunks (BI_PATCH_RECURRENT=chunks): bits, accuracy and times.

    PYTHONPATH=. python3 benchmarks/hopper/chunk_times.py OUT.json [STEP ...]   # vLLM 0.33, a Hopper GPU

A decode's time is the mean over whole chunks, since every eighth token writes the state.
"""

import json
import sys
from unittest import mock

import recurrent_times as base
import torch

from bi_patch.kernels.cuda import recurrent_chunks

base.recurrent = recurrent_chunks
base.FORMS = {
    name: recurrent_chunks.Form(f.mamba, f.keys, f.values, f.key_heads, f.heads, f.floats)
    for name, f in base.FORMS.items()
}
WARPS = (2, 4)  # of a block


def forms(form):
    return [form._replace(warps=n) for n in WARPS]


def bits(name):
    """[Rows that differ, whether the states are equal] of cuts, company, tiles and decodes."""
    layer, total = base.Layer(base.FORMS[name], 16), 333
    x = layer.make(total)
    (want,) = layer.step((1, 1, x))
    state = layer.states[1].clone()
    found = lambda got: [int((got != want).any(-1).any(-1).sum()), bool(torch.equal(layer.states[2], state))]  # noqa: E731
    cut = lambda first, last: tuple(t[first:last] for t in x)  # noqa: E731
    out = {}
    for at in (1, 2, 8, 64, 100, 256):
        parts = layer.step((2, 1, cut(0, at)))[0], layer.step((2, 0, cut(at, total)))[0]
        out[f"cut at {at}"] = found(torch.cat(parts))
    others = [layer.make(n, n) for n in (1, 17, 64, 500)]
    out["company"] = found(layer.step((3, 1, others[0]), (4, 1, others[1]), (2, 1, x), (6, 1, others[3]))[2])
    for form in forms(layer.form):
        with mock.patch.object(recurrent_chunks, "choose", lambda f, n, form=form: form):
            rows = list(layer.step((2, 1, cut(0, 200))))
            rows += [layer.ours(*cut(t, t + 1), base.ints([2])) for t in range(200, total)]
            out[f"{form.warps} warps, decode from 200"] = found(torch.cat(rows))
    return out


def tried(layer, run):
    out = {}
    for form in forms(layer.form):
        with mock.patch.object(recurrent_chunks, "choose", lambda f, n, form=form: form):
            out[f"{form.warps} warps"] = run()
    return out | {"ours": run()}


def decode_times(name, n):
    layer = base.Layer(base.FORMS[name], n)
    x, slots = layer.make(n), base.ints(range(1, n + 1))
    out = {"vLLM": base.timed(base.graphed(lambda: layer.stock_decode(*x, slots)))}
    return out | tried(layer, lambda: base.timed(base.graphed(lambda: layer.ours(*x, slots)), 32, mean=True))


def prefill_times(name, lengths):
    layer = base.Layer(base.FORMS[name], len(lengths))
    x, slots = layer.make(sum(lengths)), base.ints(range(1, len(lengths) + 1))
    more, times = base.spans(lengths, [1] * len(lengths)), 10 if sum(lengths) < 32000 else 3
    out = {"vLLM": base.timed(layer.stock_prefill(*x, slots, lengths), times)}
    return out | tried(layer, lambda: base.timed(lambda: layer.ours(*x, slots, *more), times))


STEPS = {f"bits {name}": lambda name=name: bits(name) for name in base.FORMS}
STEPS |= {f"errors {name}": lambda name=name: base.errors(name) for name in base.FORMS}
for _n in (1, 8, 64, 256):
    STEPS |= {f"decode {name} {_n}": lambda name=name, n=_n: decode_times(name, n) for name in base.FORMS}
for _l in ([8192], [1024] * 8, [32000] * 2, [128] * 64):
    _title = f"{len(_l)} x {_l[0]}"
    STEPS |= {f"prefill {name} {_title}": lambda name=name, held=_l: prefill_times(name, held) for name in base.FORMS}


def main() -> None:
    path, only = sys.argv[1], sys.argv[2:]
    found = {"device": torch.cuda.get_device_name()}
    for name in dict.fromkeys(name for part in only or [""] for name in STEPS if part in name):
        with torch.no_grad():
            found[name] = STEPS[name]()
        print(name, json.dumps(found[name]), flush=True)
        with open(path, "w") as file:
            json.dump(found, file, indent=1)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
