"""Errors of the EAGLE-3 core, grouped by what a handler does with them.

Each takes one positional message that holds every fact and the next command, so that it survives
pickling across processes.
"""


class EagleCoreError(Exception):
    """Base of every error raised on purpose by `eagle_core`."""


class TransientError(EagleCoreError):
    """Trying again may help."""


class CorruptError(EagleCoreError):
    """Data is damaged: repair or replace it, then run again."""


class MismatchError(EagleCoreError):
    """Two things do not belong together: a person decides which one is right."""


class ConfigError(EagleCoreError, ValueError):
    """What the user asked for cannot be done as written."""


class DiskError(EagleCoreError):
    """A disk is full, read-only, broken, or not for this user: a person acts."""
