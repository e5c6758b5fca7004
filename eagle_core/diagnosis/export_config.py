"""The config.json of an exported draft, compared with what its run would write.

Engines believe this file: other aux layers or norms than those of training load without an error
and accept nothing. A key that is missing is a difference too: engines then use a default.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["layers", "norms", "positions", "sizes"]
_PARTS: Mapping[str, Part] = {
    "eagle_aux_hidden_state_layer_ids": "layers",
    "use_aux_hidden_state": "layers",
    "fc_norm": "norms",
    "norm_output": "norms",
    "norm_before_residual": "norms",
    "norm_before_fc": "norms",
    "rms_norm_eps": "norms",
    "rope_theta": "positions",
    "rope_type": "positions",
    "rope_scaling": "positions",
    **dict.fromkeys(
        (
            *("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
            *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
            *("short_factor", "long_factor"),
        ),
        "positions",
    ),
    "max_position_embeddings": "positions",
    "sliding_window": "positions",
    "layer_types": "positions",
    "architectures": "sizes",
    "model_type": "sizes",
    "num_hidden_layers": "sizes",
    "attention_bias": "sizes",
    "mlp_bias": "sizes",
    "target_head": "sizes",
    "vocab_size": "sizes",
    "draft_vocab_size": "sizes",
    "hidden_size": "sizes",
    "target_hidden_size": "sizes",
    "intermediate_size": "sizes",
    "num_attention_heads": "sizes",
    "num_key_value_heads": "sizes",
    "head_dim": "sizes",
}
"""Part of each key that decides how an engine runs a draft; other keys may differ."""
_ABSENT = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One key of a configuration that differs."""

    file: str
    part: Part
    key: str
    """With the objects it is in, such as `eagle_config.use_aux_hidden_state`."""
    found: str
    expected: str

    def __str__(self) -> str:
        """Return key and value found."""
        return f"{self.key} is {self.found} in {self.file}"


def differences(
    found: Mapping[str, Any], expected: Mapping[str, Any], *, file: str
) -> tuple[Difference, ...]:
    """Return every decisive key in which a configuration differs from the expected one.

    A flag that is false is the same as one that is missing.
    """
    ours, theirs = dict(_flat(expected)), dict(_flat(found))
    differing = [
        key
        for key in dict.fromkeys([*ours, *theirs])
        if (ours.get(key) or _ABSENT) != (theirs.get(key) or _ABSENT)
    ]
    return tuple(
        Difference(
            file=file,
            part=_PARTS[key.rpartition(".")[2]],
            key=key,
            found=_text(theirs.get(key)),
            expected=_text(ours.get(key)),
        )
        for key in differing
    )


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if key in _PARTS:
            yield prefix + key, value
        elif isinstance(value, Mapping) and key != "speculators_config":
            yield from _flat(value, f"{prefix}{key}.")


def _text(value: object) -> str:
    return "missing" if value is None else str(value)
