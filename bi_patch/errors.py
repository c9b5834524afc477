"""Named errors. Each error says what failed, where, and what to do. bi_patch never turns an error into a warning."""


class BiPatchError(RuntimeError):
    """Base class of all errors that bi_patch raises."""


class SettingError(BiPatchError):
    """A setting, e.g. an environment variable or an option, is unknown or contradicts another setting."""


class UnsupportedRelease(BiPatchError):
    """bi_patch does not support the installed vLLM release."""


class ArmedTooLate(BiPatchError):
    """vLLM modules that hold patch points were imported before bi_patch was armed."""


class AnchorMoved(BiPatchError):
    """vLLM lacks the target of a patch point, or the target's source differs from the recorded source."""


class SeamOpen(BiPatchError):
    """A required patch point is open, or a process is not armed, so bi_patch cannot promise batch invariance."""


class UnsupportedFeature(BiPatchError):
    """The engine's configuration uses a feature that bi_patch does not cover."""


class UnsupportedRequest(BiPatchError, ValueError):
    """A request uses an option that bi_patch does not cover. A server answers that it is a bad request."""


class CertificateFailed(BiPatchError):
    """No kernel for an operation could be certified, and no bundled kernel serves the operation here."""


class PatchError(BiPatchError):
    """A patch of a series does not apply, does not reverse, or does not close its patch points."""


class MissingDependency(BiPatchError):
    """A library that this platform needs is missing, or nobody checked bi_patch with its version."""


class UnsupportedDevice(BiPatchError):
    """bi_patch does not know the device's limits, so it cannot choose kernels for the device."""


class ServerFailed(BiPatchError):
    """The server that `bi-patch verify` measures is down, died, or answered with an error."""


class ContractBroken(BiPatchError):
    """A trainer and its sampler differ in something that decides bits."""


class ParityBroken(BiPatchError):
    """A trainer's logprobs are not the sampler's, bit for bit."""


class RoutingDiffers(ParityBroken):
    """A trainer chose other experts than the sampler for a token, or nobody compared them."""


class GradientsOpen(BiPatchError):
    """A block of training.gradients inside another of the same model, or a layer that was called without its model."""


class GradientsUnordered(BiPatchError):
    """Backward passes came in another order than the forward passes, or one pass used a layer twice."""


class WeightsNotSynced(BiPatchError):
    """A sampler serves other weights than its trainer has."""


class WeightsBroken(BiPatchError):
    """An update of the engine's weights failed half way, or nobody told the engine core of it. The engine stops."""


class SamplerFailed(BiPatchError):
    """A sampler cannot be reached, or it could not do what training.sync asked for."""


class NoEngine(BiPatchError):
    """The call needs an armed engine, or a model of an armed engine, in this process."""
