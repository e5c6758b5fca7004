"""Base class of all recipe sections: refuses unknown keys, accepts former places of keys."""

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

logger = logging.getLogger(__name__)


class ConfigModel(BaseModel):
    """A section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    former_keys: ClassVar[Mapping[str, str]] = {}
    """Maps the former spelling of a key to its replacement; kept for one release."""
    moved_keys: ClassVar[Mapping[str, str]] = {}
    """Maps a key to its place in another section; kept for one release, as a field in no form."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Let a Prefect server accept former keys, which no form shows, in stored parameters."""
        schema = handler(core_schema)
        if cls.former_keys or cls.moved_keys:
            own = handler.resolve_ref_schema(schema)
            own["patternProperties"] = {
                f"^{former}$": own["properties"][now] for former, now in cls.former_keys.items()
            } | {f"^{key}$": {} for key in cls.moved_keys}
        return schema

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
                "the key %s is now called %s; rename it, the next release refuses the former name",
                *(former, now),
            )
            renamed[now] = renamed.pop(former)
        for key, now in cls.moved_keys.items():
            if renamed.get(key):
                logger.warning(
                    "the key %s is now %s; move it, the next release refuses it here", *(key, now)
                )
        return renamed
