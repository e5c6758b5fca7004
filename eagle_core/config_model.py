"""Base class of all recipe sections: refuses unknown keys, accepts former spellings of keys."""

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

logger = logging.getLogger(__name__)


class ConfigModel(BaseModel):
    """A section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    former_keys: ClassVar[Mapping[str, str]] = {}
    """Maps the former spelling of a key to its replacement; kept for one release."""

    @model_validator(mode="before")
    @classmethod
    def _rename_former_keys(cls, values: Any) -> Any:  # noqa: ANN401 (unparsed user input)
        """Rename former keys to their new names, with a warning.

        Raises:
            ValueError: a key is given under both names.

        """
        if not isinstance(values, Mapping):
            return values
        renamed = dict(values)
        for former, now in cls.former_keys.items():
            if former not in renamed:
                continue
            if now in renamed:
                raise ValueError(f"both {now} and its former name {former} are given; keep {now}")
            logger.warning(
                "%s.%s is now called %s; rename it, the next release refuses the former name",
                *(cls.__name__.removesuffix("Config").lower(), former, now),
            )
            renamed[now] = renamed.pop(former)
        return renamed
