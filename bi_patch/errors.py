"""Named errors. Every one says what failed, where, and what to do; none is ever downgraded to a warning."""


class BiPatchError(RuntimeError):
    """Base of all errors raised by bi_patch."""


class SettingError(BiPatchError):
    """An environment value that bi_patch does not know, or that contradicts another."""


class UnsupportedRelease(BiPatchError):
    """The installed vLLM release is not one that the seams were written and checked for."""


class ArmedTooLate(BiPatchError):
    """vLLM modules that hold seams were imported before bi_patch was armed."""


class AnchorMoved(BiPatchError):
    """A seam's target is missing in vLLM, or its source is not the one recorded for the release."""


class SeamOpen(BiPatchError):
    """A required seam is not closed in this process, so invariance cannot be promised."""


class UnsupportedFeature(BiPatchError):
    """The engine's configuration uses a feature that no closed seam covers."""


class UnsupportedRequest(BiPatchError, ValueError):
    """A request asks for what no closed seam covers; a server answers it as a bad request (ValueError)."""


class CertificateFailed(BiPatchError):
    """No route for an operation could be certified, and no bundled kernel serves it here."""


class PatchError(BiPatchError):
    """A patch of a series does not apply, does not reverse, or does not close the seam it claims."""


class MissingDependency(BiPatchError):
    """A library that this platform needs is missing, or of a version that was not checked."""


class UnsupportedDevice(BiPatchError):
    """A device whose limits are not known, so that no kernel can be chosen for it."""


class ServerFailed(BiPatchError):
    """A server under verification is down, died, or answered with an error."""
