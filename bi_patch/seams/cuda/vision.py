"""Images on CUDA: one item for each call of an encoder, on both model runners."""

from bi_patch.seams import vision
from bi_patch.seams.model import Seam, Target

_SEAM = "vision.cuda"


def prepare(model, config) -> None:
    """Check a loaded model that takes images. config: the engine's VllmConfig. Raises UnsupportedFeature."""
    if vision.takes_images(config):
        vision.check(model, _SEAM)


def certify(model, config) -> None:
    """Test that the encoder of a loaded model has equal bits in every run. Raises CertificateFailed."""
    if vision.takes_images(config):
        vision.certify(model, config, "cuda", _SEAM)


_WHY = "the encoder computes the images of all requests of a step in one call, and their number chooses its kernels"
_HOW = "one call for each image, so that its rows depend on the image alone"
_UNTIL = "upstream's encoders give an image equal bits in any batch of images"

SEAMS = (
    Seam(
        name="vision.cuda_alone",
        targets=(Target("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._execute_mm_encoder", ">=0.33"),),
        close=vision.alone,
        why=_WHY,
        how=_HOW,
        until=_UNTIL,
        causes=(36,),
    ),
    Seam(
        name="vision.cuda_alone_v2",
        targets=(Target("vllm.v1.worker.gpu.mm.encoder_runner", "EncoderRunner.execute_mm_encoder", ">=0.33"),),
        close=vision.alone_v2,
        why=_WHY,
        how=_HOW,
        until=_UNTIL,
        causes=(36,),
        on_import=True,
    ),
)
