"""The formats by name."""

from collections.abc import Callable, Mapping
from functools import partial
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
_WITHOUT_MASKS: Mapping[FormatName, Callable[[Path], Dump]] = {
    **FORMATS,
    "speculators": partial(open_speculators, with_masks=False),
}


def open_dump(name: FormatName, path: Path, *, with_masks: bool = True) -> Dump:
    """Return the rows of a dump; no states are read.

    Without `with_masks`, what holds nothing but loss masks is not looked for.

    Raises:
        ConfigError: there is no such format, or nothing of it at `path`.
        CorruptError: what lists the rows is damaged.

    """
    if name not in FORMATS:
        raise ConfigError(f"there is no format {name!r}; known: {', '.join(FORMATS)}")
    return (FORMATS if with_masks else _WITHOUT_MASKS)[name](path)
