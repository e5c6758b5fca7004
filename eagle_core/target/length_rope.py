"""RoPE whose frequencies depend on the longest row of a batch: `longrope` and `dynamic`.

In one batch with a longer text, a text would get states that it never has alone. So texts share a
batch only if they have the same frequencies, and none are left over from the batch before.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthRope:
    """The lengths at which the frequencies of a model change."""

    steps: frozenset[int] = frozenset()
    """Longest texts of `longrope` with the frequencies of short ones: one set beyond them."""
    ramps: frozenset[int] = frozenset()
    """Longest texts of `dynamic` with unscaled frequencies: a set for each length beyond them."""

    @classmethod
    def of(cls, model_config: PretrainedConfig) -> "LengthRope":
        """Return the lengths of a text model; none for models without such RoPE."""
        rope = getattr(model_config, "rope_parameters", None) or {}
        sets: Iterable[Mapping[str, Any]] = [
            one for one in rope.values() if isinstance(one, dict)
        ] or [rope]
        steps, ramps = set(), set()
        for one in sets:
            kind = str(one.get("rope_type", one.get("type")))
            if kind in {"longrope", "su"}:
                limit = one.get("original_max_position_embeddings")
                limit = limit or getattr(model_config, "original_max_position_embeddings", None)
                steps.add(int(limit or model_config.max_position_embeddings))
            elif "dynamic" in kind:
                ramps.add(int(model_config.max_position_embeddings))
        return cls(steps=frozenset(steps), ramps=frozenset(ramps))

    def group(self, num_tokens: int) -> tuple[int, ...]:
        """Return what texts have in common if their frequencies are the same."""
        return (
            *(int(num_tokens > limit) for limit in sorted(self.steps)),
            *(max(num_tokens, limit) for limit in sorted(self.ramps)),
        )

    def forget(self, model: nn.Module) -> None:
        """Undo what an earlier text has done: `dynamic` keeps the frequencies of the longest."""
        if not self.ramps:
            return
        for module in model.modules():
            names = [name for name, _ in module.named_buffers(recurse=False)]
            for name in names:
                if name.endswith("original_inv_freq"):
                    _reset(module, name.removesuffix("original_inv_freq"))


def _reset(module: nn.Module, prefix: str) -> None:
    original = getattr(module, f"{prefix}original_inv_freq")
    module.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
