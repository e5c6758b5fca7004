"""The formats by name."""

from collections.abc import Callable, Mapping
from pathlib import Path

from eagle_core.dumps.dump import Dump, FormatName
from eagle_core.dumps.model_optimizer import open_model_optimizer
from eagle_core.dumps.nemo import open_nemo
from eagle_core.dumps.specforge import open_specforge
from eagle_core.dumps.speculators import open_speculators
from eagle_core.errors import ConfigError

FORMATS: Mapping[FormatName, Callable[[Path], Dump]] = {
    "specforge": open_specforge,
    "speculators": open_speculators,
    "model-optimizer": open_model_optimizer,
    "nemo": open_nemo,
}


def open_dump(name: FormatName, path: Path) -> Dump:
    """Return the rows of a dump; no states are read.

    Raises:
        ConfigError: there is no such format, or nothing of it at `path`.
        CorruptError: what lists the rows is damaged.

    """
    if name not in FORMATS:
        raise ConfigError(f"there is no format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name](path)
