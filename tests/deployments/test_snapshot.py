"""Nothing that users type or see changes unnoticed."""

from tests.deployments import snapshot

AGAIN = "if that is meant, run: python -m tests.deployments.snapshot"


def test_deployments_schedules_and_forms_are_those_of_the_snapshot() -> None:
    taken, committed = snapshot.as_text(snapshot.take()), snapshot.PATH.read_text("utf-8")
    assert taken.splitlines() == committed.splitlines(), AGAIN


def test_every_parameter_of_a_form_has_a_description() -> None:
    bare = [
        f"{section}.{name}"
        for section, schema in snapshot.take()["sections"].items()
        for name, field in schema.get("properties", {}).items()
        if not field.get("description")
    ]
    assert not bare
