"""Errors of the EAGLE-3 core, grouped by what a handler does with them.

Each takes one positional message with every fact and the next command, so that it survives pickling
across processes.
"""


class EagleCoreError(Exception):
    """Base of every error raised on purpose by `eagle_core`."""


class TransientError(EagleCoreError):
    """A retry may succeed."""


class CorruptError(EagleCoreError):
    """Data is damaged: repair or replace it, then run again."""


class MismatchError(EagleCoreError):
    """Two inputs do not match: the user decides which one is right."""


class ConfigError(EagleCoreError, ValueError):
    """The user's request cannot be carried out as written."""


class DiskError(EagleCoreError):
    """A disk is full, read-only, broken, or denied to this user: the user must act."""
