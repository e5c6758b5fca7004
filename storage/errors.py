"""What can go wrong with a store, grouped by what the caller does about it.

Every error takes one positional message that holds every fact and the next command, so that it
survives pickling between workers.
"""


class StorageError(Exception):
    """Anything this package raises on purpose."""


class TransientError(StorageError):
    """The same call may succeed later: a timeout, a throttled bucket, a dropped connection."""


class MovedError(TransientError, FileNotFoundError):
    """What was listed is not there any more: it is part of something else now. Look again."""


class OutOfSpaceError(StorageError):
    """The file system or the quota is full. Waiting does not help: a person frees space."""


class CorruptError(StorageError):
    """Stored bytes are not what was committed. Regenerating the named shard repairs it."""


class ShardCorruptError(CorruptError):
    """An object of a shard, or its commit record, has other bytes than were committed."""


class ShardMissingError(CorruptError):
    """A committed shard lacks an object, or a snapshot names a shard that has no commit record."""


class MismatchError(StorageError):
    """Two things that must agree do not: stop, a person decides."""


class ConfigError(StorageError, ValueError):
    """The caller asked for something that cannot be."""


class SampleRefusedError(StorageError, ValueError):
    """A sample may not be stored: wrong shape, wrong id, or states no healthy model produces."""


REPAIR = "regenerate the shard: eyas repair"
PUBLISH = "publish the snapshot again: eyas repair"
RESTORE = "write it again from its copy: eyas repair"
REPLAN = "drop the plan, what it lacks is planned again: eyas repair"
"""What to do about damage; the last words of an error or a finding."""
