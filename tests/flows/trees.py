"""Compare folders byte for byte."""

import hashlib
from pathlib import Path


def digests(root: Path) -> dict[str, str]:
    """Return relative path -> sha256 of every file below `root`, hidden ones included."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
