"""One tiny model of each kind that pools, as config.json: embeddings, classifiers, rerankers and rewards.

Decoders pool the last token, or all tokens; encoders attend in both directions without a cache. Weights are random.
`ARGUMENTS` holds what vLLM needs besides the folder.
"""

from __future__ import annotations

from pathlib import Path

from bi_patch.tools.models import recipes, shapes
from bi_patch.tools.models.families import _NARROW, _as

_LABELS = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
_ONE = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
_QWEN3 = _as("Qwen3ForCausalLM", "qwen3", tie_word_embeddings=True, is_matryoshka=True)
_ENCODER = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 2048,
    "torch_dtype": "bfloat16",
    "hidden_act": "gelu",
    "max_position_embeddings": 514,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "position_embedding_type": "absolute",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": None,
}
_MODERN = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 2048,
    "torch_dtype": "bfloat16",
    "hidden_activation": "gelu",
    "max_position_embeddings": 1024,
    "global_attn_every_n_layers": 3,
    "local_attention": 64,
    "norm_eps": 1e-5,
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "classifier_pooling": "mean",
    "classifier_bias": False,
}


def _encoder(architecture: str, model_type: str, *parts: dict[str, object], **own: object) -> dict[str, object]:
    made: dict[str, object] = dict(_ENCODER)
    for part in parts:
        made |= part
    return made | own | {"architectures": [architecture], "model_type": model_type}


POOLING: dict[str, dict[str, object]] = {
    "Qwen3-Embedding": _QWEN3,
    "Qwen3-Embedding, mean": _QWEN3,
    "Qwen3, vectors of all tokens": _QWEN3,
    "Qwen3-Reranker": _as("Qwen3ForSequenceClassification", "qwen3", _ONE),
    "Qwen2 classifier": _as("Qwen2ForSequenceClassification", "qwen2", _NARROW, _LABELS),
    "Qwen2 reward": _as("Qwen2ForRewardModel", "qwen2", _NARROW),
    "GTE-Qwen2 (attention in both directions)": _as("Qwen2ForCausalLM", "qwen2", _NARROW, is_causal=False),
    "BERT": _encoder("BertModel", "bert"),
    "BERT, mean": _encoder("BertModel", "bert"),
    "BERT cross-encoder": _encoder("BertForSequenceClassification", "bert", _ONE),
    "XLM-R": _encoder("XLMRobertaModel", "xlm-roberta"),
    "XLM-R reranker": _encoder("XLMRobertaForSequenceClassification", "xlm-roberta", _ONE),
    "ModernBERT": dict(_MODERN) | {"architectures": ["ModernBertModel"], "model_type": "modernbert"},
    "ModernBERT classifier": dict(_MODERN)
    | _LABELS
    | {"architectures": ["ModernBertForSequenceClassification"], "model_type": "modernbert"},
    "BERT token classifier": _encoder("BertForTokenClassification", "bert", _LABELS),
}
_QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 4,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 32000,
    "rope_theta": 1000000.0,
}
# The sizes of published models. They are not tiny: for GPUs.
POOLING |= {
    "Qwen3-Embedding-0.6B": shapes.QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
        "is_matryoshka": True,
    },
    "Qwen3-Reranker-0.6B": shapes.QWEN3
    | _ONE
    | {
        "architectures": ["Qwen3ForSequenceClassification"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen2 classifier, 4 layers of 7B": _as("Qwen2ForSequenceClassification", "qwen2", _LABELS, _QWEN2_7B),
    "Qwen2 reward, 4 layers of 7B": _as("Qwen2ForRewardModel", "qwen2", _QWEN2_7B),
    "BERT large": _encoder(
        "BertModel",
        "bert",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        vocab_size=30522,
    ),
    "XLM-R base reranker": _encoder(
        "XLMRobertaForSequenceClassification",
        "xlm-roberta",
        _ONE,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=250002,
    ),
    "ModernBERT base": dict(_MODERN)
    | {
        "architectures": ["ModernBertModel"],
        "model_type": "modernbert",
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "vocab_size": 50368,
        "local_attention": 128,
        "max_position_embeddings": 8192,
    },
}
TINY = tuple(name for name, shape in POOLING.items() if int(str(shape["vocab_size"])) <= 2048)
_POOLING = {"runner": "pooling"}
_MEAN = {"pooler_config": {"seq_pooling_type": "MEAN"}}
ARGUMENTS: dict[str, dict[str, object]] = {
    "Qwen3-Embedding": _POOLING,
    "Qwen3-Embedding-0.6B": _POOLING,
    "Qwen3-Embedding, mean": _POOLING | _MEAN,
    "Qwen3, vectors of all tokens": _POOLING | {"pooler_config": {"task": "token_embed"}},
    "GTE-Qwen2 (attention in both directions)": _POOLING,
    "BERT, mean": _MEAN,
    "BERT large": _MEAN,
}


def write(name: str, root: str | Path) -> str:
    """Write the config.json of a model in POOLING, and a tokenizer, into a folder below `root`. Returns the folder.

    vLLM starts no pooling model without a tokenizer. Raises KeyError for a name that is not in POOLING.
    """
    shape = POOLING[name]
    folder = shapes.save(name.replace("(", "").replace(")", ""), shape, root)
    recipes.save_tokenizer(int(str(shape["vocab_size"])), Path(folder))
    return folder
