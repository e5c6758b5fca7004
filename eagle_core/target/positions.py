"""How many positions a target was made for, and what exceeds them.

Beyond them a target gives states without an error, and they mean nothing. Where RoPE is scaled the
limit is a matter of settings, so there it is only a warning.
"""

import logging
from dataclasses import dataclass

from transformers import PretrainedConfig

from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """The positions of a model."""

    limit: int | None
    """None if its configuration names none."""
    is_scaled: bool
    """Whether RoPE is scaled for longer texts than the model was first trained on."""

    @classmethod
    def of(cls, model_config: PretrainedConfig) -> "Positions":
        """Return the positions of a text model."""
        limit = getattr(model_config, "max_position_embeddings", None)
        rope = getattr(model_config, "rope_parameters", None) or {}
        by_layer = [one for one in rope.values() if isinstance(one, dict)] or [rope]
        kinds = {one.get("rope_type", one.get("type")) for one in by_layer}
        return cls(
            limit=limit if isinstance(limit, int) and limit > 0 else None,
            is_scaled=bool(kinds - {None, "default"}),
        )

    def exceeds(self, num_tokens: int) -> bool:
        """Return whether a text of `num_tokens` has more tokens than there are positions."""
        return self.limit is not None and num_tokens > self.limit

    def require(self, num_tokens: int, config: TargetConfig, *, setting: str) -> None:
        """Raise ConfigError if `num_tokens`, the value of `setting`, exceeds unscaled positions."""
        if not self.exceeds(num_tokens):
            return
        what = f"{setting} is {num_tokens:,}, but target {config.name} has {self.limit:,} positions"
        if not self.is_scaled:
            raise ConfigError(
                f"{what} (max_position_embeddings): beyond them its states mean nothing. Set "
                f"{setting} to {self.limit} or less"
            )
        logger.warning("%s (its RoPE is scaled): check that it was made for texts that long", what)
