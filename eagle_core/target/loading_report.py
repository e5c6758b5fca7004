"""What transformers says after loading: which tensors model and weights do not share.

Only the text model and its head count: states depend on nothing else.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from torch import nn
from transformers import PretrainedConfig

from eagle_core.target.decoder import find_decoder

if TYPE_CHECKING:  # takes 2 of the 8 seconds before a flow starts; only running a model needs it
    from transformers import PreTrainedModel

_NAMED = 3
"""Tensors named in a message; the others are counted."""
_OF_THE_CACHE = re.compile(r"(^|[._])[qkv]{1,2}_scale$|proj\.output_scale$|prob_output_scale$")
"""Scales of a quantised key-value cache, which is not used here."""
_NUM_FURTHER = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class LoadingInfo(TypedDict):
    """As transformers returns it."""

    missing_keys: Collection[str]
    unexpected_keys: Collection[str]
    mismatched_keys: Collection[tuple[str, Sequence[int], Sequence[int]]]
    """Name, shape in the file, shape in the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadingReport:
    """The tensors of the text model that the weights and the model do not share."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    """With the shapes of both."""
    ignored: tuple[str, ...]
    """Missing or unexpected elsewhere, such as in a vision part."""

    def faults(self) -> str:
        """Return what is wrong, naming the first tensors; empty if all is well."""
        kinds = {
            "no weights for": self.missing,
            "weights that the model has no place for:": self.unexpected,
            "weights of another shape for": self.mismatched,
        }
        return "; ".join(f"{kind} {some(names)}" for kind, names in kinds.items() if names)


def report(model: "PreTrainedModel", info: LoadingInfo) -> LoadingReport:
    """Sort transformers' loading information: what matters for the text model, and what does not.

    Args:
        model: that was loaded.
        info: of the loading.

    """
    text = _TextTensors(model)
    missing = sorted(info["missing_keys"])
    unexpected = sorted(info["unexpected_keys"])
    mismatched = sorted(
        f"{name} {list(stored)}, which should be {list(wanted)}"
        for name, stored, wanted in info["mismatched_keys"]
        if text.holds(name)
    )
    return LoadingReport(
        missing=tuple(filter(text.holds, missing)),
        unexpected=tuple(filter(text.would_hold, unexpected)),
        mismatched=tuple(mismatched),
        ignored=(
            *(name for name in missing if not text.holds(name)),
            *(name for name in unexpected if not text.would_hold(name)),
        ),
    )


class _TextTensors:
    """Which tensor names are those of the decoder and the head of a model."""

    def __init__(self, model: "PreTrainedModel") -> None:
        modules = {module: f"{name}." for name, module in model.named_modules() if name}
        decoder = find_decoder(model) or model
        self._decoder = modules.get(decoder, "")
        head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._head = modules.get(head, "lm_head.")
        self._parts = {name for name, _ in decoder.named_children()}
        text: PretrainedConfig = model.config.get_text_config()
        self._num_layers = text.num_hidden_layers
        self._num_further = max(int(getattr(text, name, None) or 0) for name in _NUM_FURTHER)

    def holds(self, name: str) -> bool:
        """Return whether it is one of the text model's own tensors."""
        return name.startswith((self._decoder, self._head))

    def would_hold(self, name: str) -> bool:
        """Return whether a tensor without a place seems to belong into the text model."""
        layer = _LAYER.search(name)
        if layer and 0 <= int(layer[1]) - self._num_layers < self._num_further:
            return False  # predicts further tokens: no layer of the model itself
        part = name.removeprefix(self._decoder).partition(".")[0]
        is_part = part in self._parts or name.startswith(self._head)
        return is_part and not _OF_THE_CACHE.search(name)


def some(names: Collection[str]) -> str:
    first = list(names)[:_NAMED]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more:,} more" if more else "")
