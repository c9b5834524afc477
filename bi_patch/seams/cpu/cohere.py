"""Cohere's norms and router: vLLM compiles them apart from the model, at first for a single number of tokens."""

from bi_patch.seams.model import Seam, Target


def _layer_norm(original):
    """layer_norm_func: PyTorch's LayerNorm in fp32, one row at a time, times the weight, rounded once."""

    def layer_norm_func(hidden_states, weight, variance_epsilon):
        from torch.nn.functional import layer_norm

        wide = layer_norm(hidden_states.float(), hidden_states.shape[-1:], None, None, variance_epsilon)
        return (weight.float() * wide).to(hidden_states.dtype)

    return layer_norm_func


def _rms_norm(original):
    """rms_norm_func: the bundled RMSNorm in fp32, times the weight, rounded once."""
    from bi_patch.ops.cpu import norm

    def rms_norm_func(hidden_states, weight, variance_epsilon):
        wide = norm.rms_norm(hidden_states.float(), None, variance_epsilon)
        return (weight.float() * wide).to(hidden_states.dtype)

    return rms_norm_func


def _certified(original):
    """LayerNorm.__init__ of Cohere: note the layer, so that load_model certifies its row order."""

    def __init__(self, param_shape=None, eps=1e-5):
        from bi_patch.ops.cpu import rows

        original(self, param_shape, eps)
        rows.register_layer_norm(self, tuple(self.weight.shape))

    return __init__


def _router(original):
    """token_choice_with_bias: the function without the compiler. The patch point moe.cpu_router certifies it."""
    return getattr(original, "_torchdynamo_orig_callable", original)


def _seam(name: str, targets: tuple[Target, ...], close, how: str, serves: tuple[str, ...] = ()) -> Seam:
    return Seam(
        name=f"cohere.cpu_{name}",
        targets=targets,
        close=close,
        why="vLLM compiles these functions separately, for the first number of tokens alone and then for all others",
        how=how,
        until="upstream compiles these functions with the model only",
        causes=(2, 17, 19),
        serves=serves,
    )


_DENSE = "vllm.model_executor.models.commandr"
_EXPERTS = "vllm.model_executor.models.cohere2_moe"

SEAMS = (
    _seam(
        "layer_norm",
        (Target(_DENSE, "layer_norm_func"),),
        _layer_norm,
        "LayerNorm is one operator of PyTorch, certified",
    ),
    _seam(
        "layer_norm_certified", (Target(_DENSE, "LayerNorm.__init__"),), _certified, "bi_patch certifies its row order"
    ),
    _seam(
        "rms_norm", (Target(_DENSE, "rms_norm_func"),), _rms_norm, "the bundled kernel serves compiled and eager code"
    ),
    _seam("rms_norm_of_experts", (Target(_EXPERTS, "rms_norm_func", "<0.33"),), _rms_norm, "the bundled kernel serves"),
    _seam("router", (Target(_EXPERTS, "token_choice_with_bias"),), _router, "it runs as it is written, certified"),
)
