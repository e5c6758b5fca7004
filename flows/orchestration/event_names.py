"""Names of the events that flows send and automations wait for. Does not import Prefect."""

DATASET_CHANGED = "eyas.dataset.changed"
SNAPSHOT_PUBLISHED = "eyas.snapshot.published"


def dataset_resource(dataset: str) -> str:
    """Return the resource id of a data set."""
    return f"eyas.dataset.{dataset}"


def store_resource(target: str, dataset: str) -> str:
    """Return the resource id of a target's store of a data set."""
    return f"eyas.store.{target}-{dataset}"
