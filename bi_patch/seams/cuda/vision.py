"""Images on CUDA: one item for each call of an encoder, on both model runners."""

import functools

from bi_patch.ops import certificates
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
        with certificates.clock("images"):
            vision.certify(model, config, "cuda", _SEAM)


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
        how="one call for each image, so that its rows depend on the image alone",
        until="upstream's encoders give an image equal bits in any batch of images",
        causes=(36,),
        on_import=on_import,
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
