"""Models that vLLM keeps in packages of their own (vllm.models), and what each package has that no patch point covers.

Read in vLLM 0.33, in the code for NVIDIA GPUs. A package that is not here has not been examined.
"""

_CHOICE = "an indexer chooses the tokens that a row attends to, and its kernel gives tied tokens no order"

PACKAGES: dict[str, str] = {
    "beam": "for up to 16 rows, other kernels compute its projections",
    "deepseek_v32": f"{_CHOICE}; the longest prompt of a step decides whether the choice counts",
    "deepseek_v4": f"{_CHOICE}; its windows and compressed keys have kernels of their own",
    "deepseek_v41": f"{_CHOICE}; decode steps of few rows have kernels of their own",
    "dots3_note": "a step with a prompt takes another form of MLA for its windows than a step without one",
    "flint": "its norms have kernels of their own, and on Blackwell GPUs also decode steps of few rows",
    "glm5next": f"{_CHOICE}; if the longest request of a step is short, the indexer does not run",
    "hy_v4": f"{_CHOICE}; its connections between layers have kernels of their own",
    "inkling": "for up to 64 rows, another kernel computes its router; its convolutions and attention are its own",
    "kimi_k3": "of Kimi K3: the number of tokens chooses kernels of its projections, and a tile between its layers",
    "minimax_m3": "an indexer chooses blocks of keys, and prompts and decode steps attend to them by two kernels",
    "muse_spark": "its norms and its router have kernels of their own; ranks project up to 256 rows in parts",
    "qwen4_exp": "for up to 64 rows, another kernel chooses blocks of keys; the batch decides how attention is split",
    "step5": "an indexer chooses regions of keys; for up to 128 rows, another kernel prepares queries and keys",
}

# Models of these packages that bi_patch covers, and the platforms.
COVERED: dict[str, frozenset[str]] = {"KimiLinearForCausalLM": frozenset({"cuda"})}


def reason(module: str, name: str = "", platform: str = "") -> str:
    """Why bi_patch refuses a model of `module`, e.g. "vllm.models.beam", or "" for other modules and covered models.

    name: the model's architecture. platform: where it shall run.
    """
    parts = module.split(".")
    if parts[:2] != ["vllm", "models"] or platform in COVERED.get(name, ()):
        return ""
    return PACKAGES.get(parts[2] if len(parts) > 2 else "", "nobody has examined its package")
