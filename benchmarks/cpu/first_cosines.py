"""Counts processes whose first cosines are of low precision: MKL's first call, made by two threads at once (cause 37).

    PYTHONPATH=. python3 -P benchmarks/cpu/first_cosines.py [COUNT] > benchmarks/results/first-cosines-DATE-DEVICE.txt

Forks COUNT processes twice, by default 1,500: as PyTorch is, and with `vector_math.settle` first. Each computes 131,072
cosines on two threads and compares them with a second call. The race shows beside other work: start something else.
"""

import os
import sys

import torch

from bi_patch.ops import vector_math


def angles() -> torch.Tensor:
    """The angles of a rotary table [4096 positions, 32], without a call of MKL's vector functions."""
    frequencies = 1.0 / 500_000.0 ** (torch.arange(0, 64, 2) / 64)
    return torch.outer(torch.arange(4096.0), frequencies)


def imprecise(settled: bool) -> bool:
    """Whether a fork's first cosines differ from its second ones."""
    child = os.fork()
    if not child:
        torch.set_num_threads(2)
        if settled:
            vector_math.settle()
        given = angles()
        os._exit(not torch.equal(given.cos(), given.cos()))
    return bool(os.waitpid(child, 0)[1])


def main() -> None:
    torch.set_num_threads(1)  # a fork of a process with threads of OpenMP would hang
    count = int((*sys.argv[1:], "1500")[0])
    print(f"PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores")
    for settled in (False, True):
        found = sum(imprecise(settled) for _ in range(count))
        words = "each function called once before" if settled else "as PyTorch is"
        print(f"{words}: {found} of {count} processes have imprecise first cosines", flush=True)


if __name__ == "__main__":
    main()
