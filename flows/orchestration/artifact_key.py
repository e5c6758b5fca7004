"""Keys of Prefect artifacts: one key is one history in the UI."""

import re


def artifact_key(*parts: str) -> str:
    """Return an artifact key as Prefect accepts it: lower-case letters, digits and dashes."""
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)
