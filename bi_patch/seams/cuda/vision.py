"""Images on CUDA: the items of a call of an encoder, on both model runners, and orders of its layers.

An order of a layer does not depend on the number of rows or images. Linear layers, patches and PyTorch's own linears
have the linears' order, norms and activations have certificates of their own, and attention has one split of keys.
"""

import functools
import logging

from bi_patch.ops import certificates
from bi_patch.seams import vision
from bi_patch.seams.model import Seam, Target

_SEAM = "vision.cuda"
_log = logging.getLogger("vllm.bi_patch")
_OWNERS = vision.OWNERS | vision.INTERN
_PATCHES = ("Conv2dLayer", "Conv3dLayer")
# FlashAttention 3 has another tile of queries where the longest sequence of a call has up to 64.
_LONG = 128


def prepare(model, config) -> None:
    """Check a loaded model that takes images. config: the engine's VllmConfig. Raises UnsupportedFeature."""
    if vision.takes_images(config):
        vision.check(model, _SEAM, _OWNERS)


def linears(model, config):
    """(weight [N, K], whether there is a bias) of each product of an encoder that is no linear layer of vLLM's."""
    from torch import nn

    if not vision.takes_images(config):
        return
    for _, layer in vision.parts(model):
        if type(layer) is nn.Linear or (type(layer).__name__ in _PATCHES and layer.enable_linear):
            yield layer.weight.flatten(1), layer.bias is not None


def certify(model, config) -> None:
    """Test that the encoder of a loaded model has equal bits in every run, and whether images may be encoded together.
    Raises CertificateFailed."""
    if vision.takes_images(config):
        with certificates.clock("images"):
            together = ordered(model) and _attends_alike(model, config.model_config.dtype)
            vision.certify(model, config, "cuda", _SEAM, together)


def ordered(model) -> bool:
    """Whether each layer of an encoder has an order that does not depend on the number of rows or images."""
    return type(model).__name__ in vision.TOGETHER and all(_ordered(layer) for _, layer in vision.parts(model))


def _attends_alike(model, dtype) -> bool:
    """Whether each kind of attention of an encoder gives an image in company the bits that the image has alone."""
    from bi_patch.ops.cuda import image_attention

    layers = [layer for _, layer in vision.parts(model) if type(layer).__name__ == "MMEncoderAttention"]
    kinds = {(layer.num_heads, layer.num_kv_heads, layer.head_size): layer for layer in layers}
    for (heads, keys, size), layer in kinds.items():
        words = "heads share keys" if heads != keys else image_attention.differs(layer.forward_cuda, heads, size, dtype)
        if words:
            _log.warning("%s: %s: other bits, so images are encoded one at a time", _SEAM, words)
            return False
    return True


def _ordered(layer) -> bool:
    kind = type(layer).__name__
    if kind == "MMEncoderAttention":
        return layer.is_flash_attn_backend and not layer.fp8_enabled
    if kind in _PATCHES:
        return layer.enable_linear
    method = getattr(layer, "quant_method", None)
    return method is None or type(method).__name__ == "UnquantizedLinearMethod"


def _attention(original):
    """vit_flash_attn_wrapper: FlashAttention as vLLM calls it, in one split of keys and with one tile."""

    @functools.wraps(original)
    def vit_flash_attn_wrapper(
        q, k, v, batch_size, is_rocm_aiter, fa_version, scale=None, cu_seqlens=None, max_seqlen=None
    ):
        import torch
        from vllm.utils.gpu_sync_debug import gpu_sync_allowed
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        each = q.size(1)
        if cu_seqlens is None:
            end = (batch_size + 1) * each
            cu_seqlens = torch.arange(0, end, step=each, dtype=torch.int32, device=q.device)
        with gpu_sync_allowed():  # the kernel's launch needs a number of Python
            longest = max(each if max_seqlen is None else int(max_seqlen), _LONG)
        rows = [x.flatten(0, 1) for x in (q, k, v)]
        out = flash_attn_varlen_func(
            *rows,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=False,
            softmax_scale=scale,
            num_splits=1,
            fa_version=fa_version,
        )
        return out.view(q.shape)

    return vit_flash_attn_wrapper


def _patches(original):
    """Conv2dLayer.forward_cuda and Conv3dLayer's: one product of all patches where patches do not overlap."""

    @functools.wraps(original)
    def forward_cuda(self, x):
        return self._forward_mulmat(x) if self.enable_linear else original(self, x)

    return forward_cuda


def _deepstack(original):
    """Qwen3VLForConditionalGeneration.embed_input_ids: clear what an earlier step left in the buffers of features."""

    @functools.wraps(original)
    def embed_input_ids(self, *args, **kwargs):
        if left := getattr(self, "deepstack_input_embeds_num_tokens", 0):
            self._clear_deepstack_input_embeds(left)
        return original(self, *args, **kwargs)

    return embed_input_ids


def _whole(original):
    """Scheduler._try_schedule_encoder_inputs: no step ends inside an image that must be computed whole, also if the
    prefix cache has the image's first tokens."""

    @functools.wraps(original)
    def _try_schedule_encoder_inputs(self, request, num_computed_tokens, num_new_tokens, budget, *args, **kwargs):
        whole = self.scheduler_config.disable_chunked_mm_input and not self.is_encoder_decoder
        if whole and _inside(request, num_computed_tokens, num_computed_tokens + num_new_tokens):
            return [], 0, budget, [], []  # the request waits for a step with room for the rest
        return original(self, request, num_computed_tokens, num_new_tokens, budget, *args, **kwargs)

    return _try_schedule_encoder_inputs


def _inside(request, first: int, end: int) -> bool:
    """Whether both a request's computed tokens and the next step would end inside one image."""
    places = [feature.mm_position for feature in request.mm_features or ()]
    return any(place.offset < first <= end < place.offset + place.length for place in places)


def _alone(name: str, target: Target, close, on_import: bool = False) -> Seam:
    return Seam(
        name=f"vision.{name}",
        targets=(target,),
        close=close,
        why="the encoder computes the images of all requests of a step in one call, and their number chooses its "
        "kernels",
        how="one call for each image, so that its rows depend on the image alone. One call for all images where each "
        "layer has an order of its own and a certificate found equal bits",
        until="upstream's encoders give an image equal bits in any batch of images",
        causes=(36,),
        on_import=on_import,
    )


def _product(name: str, layer: str) -> Seam:
    return Seam(
        name=f"vision.cuda_{name}",
        targets=(Target("vllm.model_executor.layers.conv", f"{layer}.forward_cuda", ">=0.33"),),
        close=_patches,
        why="cuDNN chooses a kernel by the number of images",
        how="patches that do not overlap are rows of a linear, with its order",
        until="cuDNN gives an image equal bits in any batch of images",
        causes=(36,),
        serves=(layer,),
        relies=(f"{layer}._forward_mulmat",),
    )


SEAMS = (
    Seam(
        name="vision.cuda_whole",
        targets=(Target("vllm.v1.core.sched.scheduler", "Scheduler._try_schedule_encoder_inputs", ">=0.33"),),
        close=_whole,
        why="where the tokens of an image attend in both directions, vLLM computes an image in one step, but for an "
        "image whose first tokens the prefix cache has: the rest may be cut, and a row then lacks the tokens of later "
        "steps",
        how="the request waits for a step that has room for the rest of the image",
        until="upstream computes the rest of an image in one step, too",
        causes=(36,),
    ),
    _alone(
        "cuda_alone",
        Target("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._execute_mm_encoder", ">=0.33"),
        vision.alone,
    ),
    _alone(
        "cuda_alone_v2",
        Target("vllm.v1.worker.gpu.mm.encoder_runner", "EncoderRunner.execute_mm_encoder", ">=0.33"),
        vision.alone_v2,
        on_import=True,
    ),
    _product("patches", "Conv2dLayer"),
    _product("cubes", "Conv3dLayer"),
    Seam(
        name="vision.cuda_attention",
        targets=(
            Target(
                "vllm.v1.attention.ops.vit_attn_wrappers",
                "vit_flash_attn_wrapper",
                ">=0.33",
                copies=("vllm.model_executor.layers.attention.mm_encoder_attention",),
            ),
        ),
        close=_attention,
        why="the number and the lengths of the images choose FlashAttention's number of splits, and its tile",
        how="one split of keys, and the tile of long sequences",
        until="upstream's mode calls FlashAttention with one split for encoders, too",
        causes=(36,),
        serves=("MMEncoderAttention",),
        on_import=True,
    ),
    Seam(
        name="vision.cuda_deepstack",
        targets=(
            Target("vllm.model_executor.models.qwen3_vl", "Qwen3VLForConditionalGeneration.embed_input_ids", ">=0.33"),
        ),
        close=_deepstack,
        why="vLLM clears the buffers of an image's features after a forward pass in Python. A step that replays one "
        "whole CUDA graph runs none, so the rows of the next step get the features of another request's image",
        how="each step clears what an earlier step left, before it writes features of its own",
        until="upstream clears the buffers inside the graph",
        causes=(36,),
        on_import=True,
    ),
)
