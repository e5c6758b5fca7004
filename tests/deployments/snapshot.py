"""What users type and see: every deployment, when it starts by itself, every parameter of its form.

After a change that is meant, write the snapshot again: python -m tests.deployments.snapshot
"""

import json
from pathlib import Path
from typing import Any

import yaml

from deployments import prefect_yaml
from deployments.registry import FLOWS

PATH = Path(__file__).parent / "snapshot.json"


def take() -> dict[str, Any]:
    """Return the deployments with schedules and triggers, and the forms of the flows."""
    names = {entry.entrypoint: entry.name for entry in FLOWS}
    deployments = {}
    for deployment in yaml.safe_load(prefect_yaml.render())["deployments"]:
        starts = {key: deployment[key] for key in ("schedules", "triggers") if key in deployment}
        deployments[f"{names[deployment['entrypoint']]}/{deployment['name']}"] = starts
    forms, sections = {}, {}
    for entry in FLOWS:
        schema = entry.load().parameters  # type: ignore[attr-defined]  # a Prefect flow
        forms[entry.name] = {"parameters": schema.properties, "required": schema.required}
        sections.update(schema.definitions or {})
    return {"deployments": deployments, "forms": forms, "sections": sections}


def as_text(snapshot: dict[str, Any]) -> str:
    """Return the snapshot as it is committed."""
    return json.dumps(snapshot, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(as_text(take()), encoding="utf-8")
