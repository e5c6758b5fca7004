"""Sends the events that let automations start what comes next.

An event may be sent twice for one thing, and what it starts finds that nothing is left to do.
"""

from collections.abc import Mapping

from prefect.events import emit_event


def send(event: str, *, resource: str, payload: Mapping[str, object]) -> None:
    """Send an event about a resource to the Prefect server."""
    emit_event(
        event,
        resource={"prefect.resource.id": resource, "prefect.resource.name": resource},
        payload=dict(payload),
    )
