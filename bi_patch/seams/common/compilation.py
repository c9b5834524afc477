"""Compiled code: one graph for every number of tokens, in caches of its own.

Stock vLLM, this bi_patch and another bi_patch never load each other's compiled code.
"""

import functools
import hashlib

from bi_patch import identity
from bi_patch.seams import active, graphs, inductor
from bi_patch.seams.common import plugins
from bi_patch.seams.model import Policy, Seam, Target


def _hash(original):
    """VllmConfig.compute_hash, the key of vLLM's compile caches: add bi_patch's digest, and the parts of K."""

    @functools.wraps(original)
    def compute_hash(self, *args, **kwargs):
        stock = original(self, *args, **kwargs)
        return hashlib.sha256(f"bi_patch {identity.digest()} {active.leaves} {stock}".encode()).hexdigest()[
            : len(stock)
        ]

    return compute_hash


def _checked(original):
    """monitor_torch_compile, the context of a compilation: check Inductor's options of this process again, and code
    among them."""

    @functools.wraps(original)
    def monitor_torch_compile(*args, **kwargs):
        if inductor.compiles():
            inductor.check()
            plugins.check_passes()
        return original(*args, **kwargs)

    return monitor_torch_compile


SEAMS = (
    Seam(
        name="compilation.cache_key",
        targets=(Target("vllm.config.vllm", "VllmConfig.compute_hash"),),
        close=_hash,
        why="an armed engine must not load code that stock vLLM or another bi_patch compiled",
        how="the hash that keys vLLM's compile caches includes a digest of bi_patch's sources",
        until="never: every bi_patch needs compile caches of its own",
        causes=(17, 18),
    ),
    Seam(
        name="compilation.start",
        targets=(Target("vllm.compilation.monitor", "monitor_torch_compile", copies=("vllm.compilation.decorators",)),),
        close=_checked,
        why="code that runs between the check of the configuration and the compilation may set options of Inductor",
        how="the policy compilation.options runs once more where a compilation starts, and plugins.code for code among "
        "the options",
        until="upstream's mode checks Inductor's options where it compiles",
        causes=(18,),
    ),
)

POLICIES = (
    Policy(
        name="compilation.one_range",
        apply=graphs.one_range,
        why="vLLM compiles separate code for each range of numbers of tokens, and each may sum in another order",
    ),
    Policy(
        name="compilation.inductor",
        apply=graphs.check_inductor,
        why="an option of Inductor takes back what arming set: Inductor then times kernels anew in each process",
    ),
    Policy(
        name="compilation.options",
        apply=inductor.check,
        why="an option set on torch._inductor.config acts on all graphs of the process: Inductor may then choose "
        "kernels by time, cut sums or round in another way",
    ),
    Policy(
        name="compilation.operators",
        apply=graphs.check_operators,
        why="with ir_op_priority, the shape of a batch decides which kernel serves an operator",
    ),
)
