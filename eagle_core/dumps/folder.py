"""The files of a dump: sorted, and named relative to its folder."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from eagle_core.errors import ConfigError

_MANY = 4
_NUMBER = re.compile(r"\d+")


def dump_files(path: Path, *, is_wanted: Callable[[str], bool], expected: str) -> list[Path]:
    """Return the wanted files at or below `path`, those with numbers in their numerical order.

    Raises:
        ConfigError: there are none; says what is there instead.

    """
    if path.is_file() and is_wanted(path.name):
        return [path]
    if not path.exists():
        raise ConfigError(f"{path} does not exist; name the folder that the other tool wrote")
    everything = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    found = [one for one in everything if is_wanted(one.name)]
    if not found:
        kinds = Counter("".join(one.suffixes[-2:]) or one.name for one in everything)
        there = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(_MANY))
        raise ConfigError(
            f"{path} has no {expected}; it has {there or 'no files'}. Name the folder of the dump, "
            "or its format: specforge (.ckpt, .ckpt.gz), speculators (hs_*.safetensors), "
            "model-optimizer (.pt), nemo (manifest.json and shard-*.safetensors)"
        )
    return sorted(found, key=lambda one: (_in_order(str(one.parent)), _in_order(one.name)))


def location_of(path: Path) -> str:
    """Return the name of a file in ledgers and journals: two dumps may have equal file names."""
    return str(path.absolute())


def _in_order(name: str) -> tuple[tuple[str, int], ...]:
    texts, numbers = _NUMBER.split(name), [int(one) for one in _NUMBER.findall(name)]
    return tuple(zip(texts, [*numbers, -1], strict=True))
