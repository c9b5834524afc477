"""Measures `training.gradients` on a GPU, without a sampler: bits for other cuts into micro-batches, and seconds.

    PYTHONPATH=. python3 benchmarks/hopper/gradients.py [SHAPE] [--layers N] [--sequences 24] [--length 40]
        [--micro 24,12,5,1] [--results FOLDER] [--profile FILE]

SHAPE is "SmolLM2-135M" or a dense model of bi_patch/tools/models/shapes.py. Its weights are random. The gradients of
each cut are compared with those of the first one, bit by bit. Then three ways take turns with the first cut: the
kernels that add all sequences of a micro-batch in one launch, the way that adds sequence by sequence, and autograd. It
prints which kernels passed their trial, and writes parity-*.json. --profile: where the host's time goes, as text.

Exit code 1: an element differs, or no kernel passed.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import io
import os
import pstats
import statistics
import sys
import time
from pathlib import Path

SMOL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
FAR = 0.05  # of autograd's gradient, in bf16


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="SmolLM2-135M")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--length", type=int, default=40, help="tokens of the longest sequence; others have fewer")
    parser.add_argument("--micro", default="24,12,5,1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--profile", type=Path)
    return parser.parse_args()


def load(a: argparse.Namespace):
    """The model with random weights in fp32, armed for bf16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    from bi_patch import training
    from bi_patch.tools.models.shapes import SHAPES

    torch.manual_seed(0)
    if a.shape == "SmolLM2-135M":
        config = LlamaConfig(**SMOL)
    else:
        held = dict(SHAPES[a.shape])
        config = AutoConfig.for_model(held.pop("model_type"), **held)
    config.num_hidden_layers = a.layers or config.num_hidden_layers
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(_device()).train()
    return training.arm(model, dtype=torch.bfloat16)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class Steps:
    """Forward and backward of all sequences, in micro-batches. spent: milliseconds of the parts of the last step."""

    def __init__(self, model, a: argparse.Namespace) -> None:
        import torch

        self.model, self.spent = model, {}
        draw = torch.Generator().manual_seed(1)
        lengths = [max(2, a.length - 3 * (i % 4)) for i in range(a.sequences)]
        self.sequences = [torch.randint(0, model.config.vocab_size, (n,), generator=draw) for n in lengths]

    def __call__(self, micro: int, chains: bool = True) -> dict:
        """The gradient of each parameter by name, fp32. chains: within training.gradients."""
        from bi_patch import training

        self.spent = dict.fromkeys(("forward host", "forward", "backward host", "backward"), 0.0)
        self.model.zero_grad()
        began = _now()
        with training.gradients(self.model) if chains else contextlib.nullcontext():
            for at in range(0, len(self.sequences), micro):
                self._part(self.sequences[at : at + micro])
        self.spent["all"] = (_now() - began) * 1000
        found = {}
        for name, parameter in self.model.named_parameters():
            found[name] = parameter.main_grad if chains else parameter.grad
            parameter.main_grad = parameter.grad = None
        return found

    def _part(self, part) -> None:
        import torch

        from bi_patch import training

        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(_device())
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in part], batch_first=True).to(_device())
        times = [_now()]
        own = training.logprobs(self.model, ids, mask)
        times += [time.perf_counter(), _now()]
        (own.sum() / 1000).backward()
        times += [time.perf_counter(), _now()]
        for name, begin, end in zip(self.spent, (0, 0, 2, 2), (1, 2, 3, 4)):
            self.spent[name] += (times[end] - times[begin]) * 1000


def _now() -> float:
    """The time when the device has done its work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def sequence_by_sequence():
    """Within this block, no chain kernel serves."""
    from bi_patch.training.cuda import chains

    before = chains._serves
    chains._serves = lambda *asked: False
    try:
        yield
    finally:
        chains._serves = before


def trials() -> dict[str, bool]:
    """Each trial of a chain kernel in this process, and whether the kernel passed."""
    from bi_patch.training.cuda import chains

    return dict(chains.TRIALS)


def turns(steps: Steps, micro: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a step, by way: the median of `repeats` turns."""
    ways = {
        "one launch": (contextlib.nullcontext, True),
        "sequence by sequence": (sequence_by_sequence, True),
        "autograd": (contextlib.nullcontext, False),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for at in range(repeats + 1):
        for name, (within, chains) in ways.items():
            with within():
                steps(micro, chains)
            if at:
                times[name].append(steps.spent["all"])
    return {name: round(statistics.median(found), 1) for name, found in times.items()}


def profiled(steps: Steps, micro: int) -> str:
    import torch

    profile = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        steps(micro)
        profile.enable()
        steps(micro)
        profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(60)
    return text.getvalue()


def main() -> int:
    a = parse()
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    import torch
    from trainer import _info

    import bi_patch  # noqa: F401  arms before vllm loads
    from bi_patch.ops import bits
    from bi_patch.tools import evidence
    from bi_patch.tools.evidence import InvarianceRow, Parity

    model = load(a)
    steps = Steps(model, a)
    cuts = [int(size) for size in a.micro.split(",")]
    label = f"{a.shape}{f', {a.layers} layers' if a.layers else ''} bf16, random weights, trainer alone"
    shape = f"{a.sequences} sequences of up to {a.length:,} tokens"
    first, rows = steps(cuts[0]), []
    print(f"first step: {steps.spent}", flush=True)
    for micro in (*cuts[1:], cuts[0]):
        found = steps(micro)
        wrong = sum(bits.differing(found[name], value) for name, value in first.items())
        rows.append(
            InvarianceRow(
                label,
                f"gradients, {shape}: micro-batches of {micro} against {cuts[0]}",
                sum(value.numel() for value in first.values()),
                wrong,
            )
        )
        told = {name: round(ms, 1) for name, ms in steps.spent.items()}
        print(f"micro-batches of {micro}: {wrong} of {rows[-1].compared:,} differ, ms {told}", flush=True)
    own = steps(cuts[0], chains=False)
    far = max(float((own[name].float() - value).norm() / value.norm()) for name, value in first.items())
    print(f"autograd's gradients are {far:.3g} away", flush=True)
    rows.append(InvarianceRow(label, f"gradients, {shape}: far from autograd's", len(first), int(not far < FAR)))
    passed = trials() if torch.cuda.is_available() else {}
    for name, good in passed.items():
        print(f"{'serves' if good else 'FAILED its trial'}: {name}", flush=True)
    times = turns(steps, cuts[0], a.repeats) if torch.cuda.is_available() else {}
    print(f"ms of a step with micro-batches of {cuts[0]}: {times}", flush=True)
    if a.profile:
        a.profile.write_text(profiled(steps, cuts[0]))
    made = evidence.new(Parity, _info())
    made.rows = rows
    made.note = f"milliseconds of a step in one micro-batch: {times}; chain kernels that serve: {sum(passed.values())}"
    made.note += f" of {len(passed)}"
    a.results.mkdir(parents=True, exist_ok=True)
    print(evidence.write(made, a.results), flush=True)
    return int(evidence.total_differing(rows) > 0 or (bool(passed) and not any(passed.values())))


if __name__ == "__main__":
    sys.exit(main())
