"""Which scalings of the rotary embedding a draft may have.

Only those for which training, transformers and vLLM compute the same angles at every position.
vLLM has one table of angles per model; transformers may choose others for a longer text:

* `dynamic` is the plain embedding up to `max_position_embeddings`. Beyond, vLLM has no angles.
* `longrope` has two lists of factors. vLLM chooses by the longest context that is served,
  transformers by the text at hand. With the same list twice there is nothing to choose.
"""

import math
from collections.abc import Mapping
from typing import Any

_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
_OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor",),
}
_NEUTRAL = {"partial_rotary_factor": 1.0}
"""Keys that say nothing with these values."""


def checked_scaling(
    scaling: Mapping[str, Any],
    *,
    rope_theta: float,
    head_dim: int,
    max_position_embeddings: int,
) -> dict[str, Any] | None:
    """Return a scaling as the draft's configuration holds it; None for the plain embedding.

    Keys without a value are left out, `type` is called `rope_type`, and factors are real numbers.

    Raises:
        ValueError: the type is unknown, a key is missing or unknown, or engines would not agree.

    """
    found = {key: value for key, value in scaling.items() if value is not None}
    kind = found.pop("type", None)
    kind = found.pop("rope_type", kind) or "default"
    if found.pop("rope_theta", rope_theta) != rope_theta:
        raise ValueError(f"rope_scaling has another rope_theta than the draft's, {rope_theta}")
    for key, value in _NEUTRAL.items():
        if found.pop(key, value) != value:
            raise ValueError(f"rope_scaling.{key} is not supported: the draft rotates whole heads")
    if kind == "default" and not found:
        return None
    if kind not in _REQUIRED:
        known = ", ".join(_REQUIRED)
        raise ValueError(
            f"rope_scaling of type {kind} with {', '.join(found) or 'no keys'} is not supported: "
            f"use {known}, or none"
        )
    _require_keys(kind, found)
    if kind == "longrope":
        _require_one_list(found, head_dim, max_position_embeddings)
    return {"rope_type": kind, **{key: _plain(key, value) for key, value in found.items()}}


def _require_keys(kind: str, found: Mapping[str, Any]) -> None:
    missing = [key for key in _REQUIRED[kind] if key not in found]
    unknown = [key for key in found if key not in (*_REQUIRED[kind], *_OPTIONAL.get(kind, ()))]
    if missing or unknown:
        lacks = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}"
        raise ValueError(
            f"rope_scaling of type {kind} {lacks}; it needs {', '.join(_REQUIRED[kind])} and may "
            f"have {', '.join(_OPTIONAL.get(kind, ())) or 'nothing else'}: engines would not agree "
            "on the angles"
        )
    numbers = {key: value for key, value in found.items() if not isinstance(value, list | tuple)}
    for key, value in numbers.items():
        if key != "truncate" and not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"rope_scaling.{key} is {value!r}; expected a number above 0")


def _require_one_list(
    found: Mapping[str, Any], head_dim: int, max_position_embeddings: int
) -> None:
    short, long = (list(found[key]) for key in ("short_factor", "long_factor"))
    if short != long:
        raise ValueError(
            "rope_scaling of type longrope has two lists of factors: vLLM chooses by the longest "
            "context it serves, transformers by the length of the text, so a draft cannot agree "
            "with both; give one list as short_factor and as long_factor, or no rope_scaling"
        )
    if len(long) != head_dim // 2:
        raise ValueError(
            f"rope_scaling.long_factor has {len(long)} numbers; expected {head_dim // 2}, half of "
            "the draft's head size"
        )
    implied = max_position_embeddings / found["original_max_position_embeddings"]
    if not math.isclose(found.get("factor", implied), implied):
        raise ValueError(
            f"rope_scaling.factor is {found['factor']}, but vLLM uses max_position_embeddings / "
            f"original_max_position_embeddings, which is {implied}; leave factor out"
        )


def _plain(key: str, value: Any) -> Any:  # noqa: ANN401 (a value of JSON)
    if isinstance(value, list | tuple):
        return [float(one) for one in value]
    # vLLM takes an integer factor of the type `linear` for a list.
    return float(value) if key == "factor" else value
