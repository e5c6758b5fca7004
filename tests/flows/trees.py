"""Compare folders byte for byte."""

import hashlib
from pathlib import Path

from storage.store import Store
from tests.storage.synthetic import tree_digests


def digests(root: Path) -> dict[str, str]:
    """Return relative path -> digest of every file below `root`, hidden ones included.

    Of a store, the names of the attempts at its shards are left out.
    """
    if (root / "store.json").exists():
        return tree_digests(Store.open(str(root)))
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
