"""Sends the events that trigger automations.

An event may be sent twice; the second flow run that it starts finds nothing left to do.
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
