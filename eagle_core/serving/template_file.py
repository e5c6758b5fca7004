"""A chat template in a file, from which servers read it."""

import hashlib
from pathlib import Path

from eagle_core.atomic_files import write_text
from eagle_core.target.weights import cache_path

_DIGITS = 16


def template_file(text: str) -> Path:
    """Return a file in the user's cache with this text; its name has a digest of it."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
    path = cache_path() / "templates" / f"{digest}.jinja"
    if not path.exists():
        write_text(path, text)
    return path
