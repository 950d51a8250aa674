"""Errors that end a command."""


class InputError(ValueError):
    """What the user gave cannot be used. Commands print the message, one line, and exit with status 2."""


class ConfigError(InputError):
    """A configuration that cannot be run. The message names the key, what is wrong and what would do."""


class CheckpointError(InputError):
    """A checkpoint that cannot be used, or cannot be written. The message names the file or folder and what to do."""


class PeerError(RuntimeError):
    """Another rank met an error, which it reports; this one only stops."""


class TrainingError(RuntimeError):
    """The run cannot go on, though the user did nothing wrong. Commands print the message and exit with status 1."""
