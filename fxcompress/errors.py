"""Every error that fxcompress raises on purpose.

A message says what was wrong, where (module path, node, file and line) and what to do about it.
"""

__all__ = [
    "FxCompressError",
    "PassError",
    "PreconditionError",
    "RecoveryError",
    "SerializationError",
    "TraceError",
    "TraceWarning",
    "UsageError",
    "VerificationError",
]


class FxCompressError(Exception):
    """Base class of all errors of this package."""


class UsageError(FxCompressError, ValueError):
    """The call itself is wrong: an unknown pass name, a bad option, inputs that are no inputs."""


class TraceError(FxCompressError):
    """The model could not be recorded as a graph that is faithful to it."""


class PreconditionError(FxCompressError):
    """A pass, or the pipeline, refuses this model or these arguments before changing anything."""


class PassError(FxCompressError):
    """A pass raised while it rewrote its private copy; the caller's model is as it was."""


class VerificationError(FxCompressError):
    """The rewritten graph does not keep the guarantee that its pass gives."""


class RecoveryError(FxCompressError):
    """Training cannot go on: a loss that is not finite, a checkpoint that cannot be written or read."""


class SerializationError(FxCompressError):
    """A graph holds what cannot be saved, or a saved one is damaged, of a later version, or calls what it may not."""


class TraceWarning(UserWarning):
    """A graph was recorded, and something about it is narrower than the model was."""
