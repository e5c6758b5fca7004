"""Errors of the flows. Each error takes one message with the next command."""


class FlowError(Exception):
    """Base of every error raised on purpose by `flows`."""


class ChildKilledError(FlowError):
    """A child process died without a result: out of memory, a device fault, a reboot."""


class ChildFailedError(FlowError):
    """A child process ended with an unexpected error: a retry would fail too."""


class RunStoppedError(FlowError):
    """The run was asked to stop before its work was done."""


class MissingShardsError(FlowError):
    """Some shards have no commit record after all batches have ended."""


class RunBusyError(FlowError):
    """Another process trains the same run."""


class MachinesApartError(FlowError):
    """The machines of a run did not meet in time."""


class TrainingStoppedError(FlowError):
    """Training stopped on request and wrote a checkpoint; later stages must not run."""


class DoesNotFitError(FlowError):
    """The states would not fit on the disk or into the budget: the user decides what to change."""


class DamagedStoreError(FlowError):
    """A store holds other bytes, or other states, than were committed."""


class ServerFailedError(FlowError):
    """Prefect's temporary server does not start."""


class ServerUnreachableError(FlowError):
    """Prefect's server does not answer: it restarts, or a cable is out."""


class ProblemsFoundError(FlowError):
    """The checks of a run found what lowers its acceptance: the user decides what to change."""
