"""The errors of a store, grouped by how the caller reacts.

Every error takes one positional message with all facts and the next command, so that it survives
pickling between workers.
"""


class StorageError(Exception):
    """Anything this package raises on purpose."""


class TransientError(StorageError):
    """The same call may succeed later: a timeout, a throttled bucket, a dropped connection."""


class MovedError(TransientError, FileNotFoundError):
    """A listed object is gone: its content was moved into another object. List again."""


class OutOfSpaceError(StorageError):
    """The file system or the quota is full. Waiting does not help: a person must free space."""


class CorruptError(StorageError):
    """Stored bytes are not what was committed. Regenerating the named shard repairs it."""


class ShardCorruptError(CorruptError):
    """An object of a shard, or its commit record, differs from what was committed."""


class ShardMissingError(CorruptError):
    """A committed shard lacks an object, or a snapshot names a shard that has no commit record."""


class MismatchError(StorageError):
    """Two things that must agree differ. Stop: a person must decide."""


class ConfigError(StorageError, ValueError):
    """The caller asked for something impossible."""


class SampleRefusedError(StorageError, ValueError):
    """A sample is invalid: wrong shape, wrong id, or states that no healthy model produces."""


REPAIR = "regenerate the shard: eyas repair"
PUBLISH = "publish the snapshot again: eyas repair"
RESTORE = "restore it from its copy: eyas repair"
REPLAN = "delete the plan and plan its missing samples again: eyas repair"
"""How to repair damage; the end of an error message or a finding."""
