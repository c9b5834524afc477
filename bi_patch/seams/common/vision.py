"""Images are known by their content: a name that somebody gave to an image stands for nothing.

vLLM caches processed images, encoded images, keys and values by an image's hash. A client can give an image a name,
which takes the hash's place. Then another image of the same name gets the first one's rows.
"""

import functools

from bi_patch.platforms.features import images
from bi_patch.seams import vision
from bi_patch.seams.common.refused import bad_request
from bi_patch.seams.model import Seam, Target

_TAKEN = ("image", "prompt_embeds")  # prompt embeddings beside images are refused by the feature table


def _names(original):
    """BaseRenderer._process_mm_uuids: refuse a request that names its images, or brings what no run has compared."""

    def _process_mm_uuids(self, mm_data, mm_data_items, mm_uuid_items, mm_req_id):
        taken = (*_TAKEN, "video") if _takes_videos(self.config) else _TAKEN
        kinds = sorted(kind for kind, count in mm_data_items.get_all_counts().items() if count and kind not in taken)
        if kinds:
            raise bad_request(
                f"vision.names: batch invariance does not cover {' and '.join(kinds)} for this model: no engine's "
                "answers to them were compared. Leave them out, or start the engine with BI_PATCH=0"
            )
        if (videos := mm_data_items.get("video")) is not None:
            videos.data = [_frames(video) for video in videos.data]
        if any(name is not None for names in mm_uuid_items.values() for name in names):
            raise bad_request(
                "vision.names: batch invariance does not cover names of images (multi_modal_uuids, or uuid in a chat): "
                "another image of this name may be in the cache. Leave them out, or start the engine with BI_PATCH=0"
            )
        return original(self, mm_data, mm_data_items, mm_uuid_items, mm_req_id)

    return _process_mm_uuids


def _takes_videos(config) -> bool:
    from vllm.platforms import current_platform

    return images.takes_videos(config, current_platform.device_type)


def _frames(video):
    """The frames of a video without the file that they were read from, whose bytes do not tell which were read."""
    if isinstance(video, tuple):
        frames, told = video
        return getattr(frames, "media", frames), told
    raise bad_request(
        "vision.names: batch invariance covers videos whose frames and times are given together. Give (frames, "
        "metadata), or leave the video out"
    )


def _sent(original):
    """mm_kwargs_from_features: refuse images that a client sends encoded, under hashes of its own."""

    def mm_kwargs_from_features(features):
        raise bad_request(
            "vision.sent: batch invariance does not cover images that a client names by a hash (features of the "
            "token-in-token-out API): another image of this hash may be in the cache. Send the images themselves, or "
            "start the engine with BI_PATCH=0"
        )

    return mm_kwargs_from_features


class Made(dict):
    """The hashes of a prompt's images, as vLLM's renderer made them from their content. Nobody may write into them."""

    def __init__(self, hashes):
        super().__init__(hashes)
        self.made = repr(self)


def _rendered(original):
    """BaseRenderer._process_multimodal: what the renderer made is known again when it arrives at the engine."""

    @functools.wraps(original)
    def _process_multimodal(self, *args, **kwargs):
        found = original(self, *args, **kwargs)
        found["mm_hashes"] = Made(found["mm_hashes"])
        return found

    return _process_multimodal


def _arriving(original):
    """InputProcessor._validate_model_inputs: refuse a rendered prompt whose hashes are not the renderer's."""

    @functools.wraps(original)
    def _validate_model_inputs(self, *prompts):
        for prompt in prompts:
            hashes = (prompt or {}).get("mm_hashes")
            known = hashes is None or (type(hashes) is Made and hashes.made == repr(hashes))
            if not known and vision.takes_images(self.vllm_config):
                raise bad_request(
                    "vision.rendered: batch invariance does not cover prompts that bring hashes of images "
                    "(mm_hashes): another image of this hash may be in the cache. Give the images (multi_modal_data), "
                    "and let the engine render them, or start it with BI_PATCH=0"
                )
        return original(self, *prompts)

    return _validate_model_inputs


def _image_id(original):
    """_get_image_id_bytes: no image is known by the number in its EXIF data."""

    def _get_image_id_bytes(image):
        return None

    return _get_image_id_bytes


def _seam(name: str, target: Target, close, how: str) -> Seam:
    return Seam(
        name=f"vision.{name}",
        targets=(target,),
        close=close,
        why="an image that bears the name of another one gets the other one's rows from the caches",
        how=how,
        until="upstream's hash of an image always holds its content",
        causes=(36,),
        on_import=True,
    )


_BY_TOKENS = "vllm.entrypoints.scale_out.token_in_token_out"

SEAMS = (
    _seam(
        "names",
        Target("vllm.renderers.base", "BaseRenderer._process_mm_uuids", ">=0.32"),
        _names,
        "a request that names its images is refused, and so is one with sound, or with video where no run compared it",
    ),
    _seam(
        "sent",
        Target(f"{_BY_TOKENS}.mm_features", "mm_kwargs_from_features", ">=0.32", copies=(f"{_BY_TOKENS}.serving",)),
        _sent,
        "a request that sends hashes of images is refused",
    ),
    _seam(
        "made",
        Target("vllm.renderers.base", "BaseRenderer._process_multimodal", ">=0.32"),
        _rendered,
        "hashes that vLLM's renderer made are marked",
    ),
    _seam(
        "rendered",
        Target("vllm.v1.engine.input_processor", "InputProcessor._validate_model_inputs", ">=0.32"),
        _arriving,
        "a rendered prompt whose hashes bear no mark, or were written to, is refused",
    ),
    _seam(
        "image_id",
        Target("vllm.multimodal.hasher", "_get_image_id_bytes", ">=0.32"),
        _image_id,
        "the hash always holds the pixels, or the bytes of the file",
    ),
)
