"""Images on CPU: one item for each call of an encoder, and an encoder whose bits do not depend on threads."""

import functools

from bi_patch.seams import vision
from bi_patch.seams.model import Seam, Target

_SEAM = "vision.cpu"
_OWNERS = vision.OWNERS | vision.INTERN
_PROJECTION = "mm_input_projection_weight"  # of Gemma 3: [width of the tower, width of the language model]


def prepare(model, config) -> None:
    """Check a loaded model that takes images, and give its patches and PyTorch's linears the bundled GEMM.

    config: the engine's VllmConfig. Raises UnsupportedFeature for layers that are not covered.
    """
    import torch

    from bi_patch.ops.cpu import dense

    if not vision.takes_images(config):
        return
    vision.check(model, _SEAM, _OWNERS)
    for _, layer in vision.parts(model):
        if type(layer) is torch.nn.Linear:
            dense.take(layer)
        elif type(layer).__name__ in ("Conv2dLayer", "Conv3dLayer") and layer.enable_linear:
            dense.take_patches(layer)
        elif type(layer).__name__ == "Gemma3MultiModalProjector":
            dense.take_projection(layer, _PROJECTION)


def certify(model, config) -> None:
    """Test that the encoder of a loaded model has equal bits in every run. Raises CertificateFailed."""
    if vision.takes_images(config):
        vision.certify(model, config, "cpu", _SEAM)


def _patches(original):
    """Conv2dLayer._forward_mulmat and Conv3dLayer's: the bundled GEMM multiplies the patches of a prepared layer."""

    def _forward_mulmat(self, x):
        from bi_patch.ops.cpu import dense

        made = dense.patches(self, x)
        return original(self, x) if made is None else made

    return _forward_mulmat


def _projector(original):
    """Gemma3MultiModalProjector.forward: as vLLM's, and the bundled GEMM multiplies."""

    @functools.wraps(original)
    def forward(self, vision_outputs):
        from bi_patch.ops.cpu import dense

        if "_packed" not in self.__dict__ or vision_outputs.dtype != getattr(self, _PROJECTION).dtype:
            return original(self, vision_outputs)
        images, _, width = vision_outputs.shape
        side = self.patches_per_image
        rows = vision_outputs.transpose(1, 2).reshape(images, width, side, side).contiguous()
        pooled = self.avg_pool(rows).flatten(2).transpose(1, 2).contiguous()
        return dense.project(self, self.mm_soft_emb_norm(pooled), _PROJECTION)

    return forward


def _product(name: str, layer: str) -> Seam:
    return Seam(
        name=f"vision.cpu_{name}",
        targets=(Target("vllm.model_executor.layers.conv", f"{layer}._forward_mulmat"),),
        close=_patches,
        why="PyTorch divides the product of an image's patches among threads by the number of patches",
        how="the bundled GEMM multiplies, with one order for each row",
        until="oneDNN gives equal bits for every number of rows and threads",
        causes=(26,),
        serves=(layer,),
    )


SEAMS = (
    Seam(
        name="vision.cpu_alone",
        targets=(Target("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._execute_mm_encoder"),),
        close=vision.alone,
        why="the encoder computes the images of all requests of a step in one call, padded to one size",
        how="one call for each image, so that its rows depend on the image alone",
        until="upstream's encoders give an image equal bits in any batch of images",
        causes=(36,),
    ),
    _product("patches", "Conv2dLayer"),
    _product("cubes", "Conv3dLayer"),
    Seam(
        name="vision.cpu_gemma3",
        targets=(Target("vllm.model_executor.models.gemma3_mm", "Gemma3MultiModalProjector.forward"),),
        close=_projector,
        why="PyTorch divides the product of an image's rows among threads by the number of rows",
        how="the bundled GEMM multiplies, with one order for each row",
        until="oneDNN gives equal bits for every number of rows and threads",
        causes=(26,),
        on_import=True,
    ),
)
