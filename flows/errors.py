"""What can go wrong between the stages. Each error takes one message with the next command."""


class FlowError(Exception):
    """Base of every error raised on purpose by `flows`."""


class ChildKilledError(FlowError):
    """A child process died without an answer: out of memory, a device fault, a reboot."""


class ChildFailedError(FlowError):
    """A child process ended by an error that nobody expected: it would happen again."""


class RunStoppedError(FlowError):
    """The run ends before its work does, because somebody asked it to."""


class MissingShardsError(FlowError):
    """Some shards have no commit record after every batch has ended."""


class RunBusyError(FlowError):
    """Another process trains the same run."""


class TrainingStoppedError(FlowError):
    """Training was asked to stop, wrote a checkpoint and did; what comes after it must not run."""


class DoesNotFitError(FlowError):
    """The states would not fit on the disk or into the budget: a person decides what to change."""


class DamagedStoreError(FlowError):
    """A store holds other bytes, or other states, than were committed."""


class ServerFailedError(FlowError):
    """Prefect's own server does not start."""
