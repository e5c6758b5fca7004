"""The frozen target model, with hooks on its aux layers, and its cached forward passes.

Conventions (docs/design.md, section 4): an aux layer id is the 0-based decoder layer whose *output*
is captured; `last` is the state after the final norm, so that `lm_head(last)` gives the logits.
Loading refuses a model for which that does not hold (logit soft-capping, logit scaling).

Shapes: B batch, T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from eagle_core.errors import ConfigError, CorruptError
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.decoder import LayerOutput, find_decoder, state_of
from eagle_core.target.length_rope import LengthRope
from eagle_core.target.loading import load_model
from eagle_core.target.model_config import (
    aux_layers,
    read_model_config,
    resolve_device,
)
from eagle_core.target.skeleton import certain
from eagle_core.target.tree_attention import added_mask, keep_entries, require_tree_attention

Captured = tuple[Tensor, list[Tensor]]
"""The last state [B, T, H] of a batch, and those of the captured layers."""
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TargetModel:
    """A loaded causal language model, never trained, with hooks on its aux layers only.

    Spread over GPUs, each layer runs where its weights are; ids go to the first GPU, and states and
    logits come back to it.
    """

    def __init__(
        self, model: nn.Module, *, config: TargetConfig, model_config: PretrainedConfig
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.aux_layers = aux_layers(config, model_config.num_hidden_layers)
        self.rope = LengthRope.of(model_config)
        self.device = next(model.parameters()).device
        self._model = model.eval().requires_grad_(requires_grad=False)
        self._decoder = _decoder_of(model, config, model_config.num_hidden_layers)
        self._lm_head = plain_head(model, config)
        if self.device.type != "meta":  # a model without values
            self._check_head()

    @classmethod
    def load(cls, config: TargetConfig, *, is_spread: bool = False) -> "TargetModel":
        """Load the target's weights onto its device, or spread over all visible GPUs.

        Raises:
            ConfigError: no weights, an architecture that is not supported, GPUs that are too small
                together, or logits that are not `lm_head(last)`.
            CorruptError: weights are missing, left over, or of another shape; names them. Or they
                give logits that are not finite.

        """
        folder = weights.locate(config)
        model_config = read_model_config(config, folder)  # fails before minutes of loading
        model = load_model(config, folder, is_spread=is_spread)
        if not is_spread:
            nn.Module.to(model, resolve_device(config.device))
        with certain(config, f"{type(model).__name__} cannot be run"):
            return cls(model, config=config, model_config=model_config)

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch, padding included."""
        return self.config.batch_tokens

    @property
    def pass_tokens(self) -> int:
        """1: all weights are in memory for each batch."""
        return 1

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, H] the head that turns `last` into logits."""
        weight: Tensor = self._lm_head.weight  # type: ignore[assignment]
        return weight

    @property
    def num_bytes(self) -> int:
        """Return the size of the weights in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._model.parameters())

    def logits(self, last: Tensor) -> Tensor:
        """Return the target's logits [..., V] for post-norm states [..., H]."""
        logits: Tensor = self._lm_head(last)
        return logits.to(last.device)

    @property
    def decodes_batches(self) -> bool:
        """Whether texts of different lengths can share a cache; not with sliding-window layers."""
        return not any(
            getattr(layer, "is_sliding", False)
            for layer in DynamicCache(config=self.model_config).layers
        )

    @property
    def can_roll_back(self) -> bool:
        """Whether the cache can drop tokens again; not with layers that keep a recurrent state."""
        ids = torch.ones(1, 4, dtype=torch.int64, device=self.device)
        _, _, cache = self.forward_cached(ids, None)
        return cache.is_croppable

    @torch.inference_mode()
    def forward_cached(
        self,
        input_ids: Tensor,
        past: DynamicCache | None,
        *,
        valid_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, DynamicCache]:
        """Run ids [B, T] after `past`; return (last [B, T, H], aux [B, T, 3H], grown cache).

        `valid_mask` [B, S + T] is False for entries that no token may attend to. `positions` [B, T]
        are the tokens' positions in their texts. Without both, all texts have the same length.
        """
        cache = DynamicCache(config=self.model_config) if past is None else past
        last, aux = self.run(
            input_ids,
            past_key_values=cache,
            use_cache=True,
            attention_mask=valid_mask,
            position_ids=positions,
        )
        return last, torch.cat(aux, dim=-1), cache

    def require_tree(self, num_tokens: int) -> None:
        """Raise ConfigError if the target cannot verify trees, `num_tokens` with the text."""
        attention = getattr(self._model.config, "_attn_implementation", None)
        require_tree_attention(
            self.config.name, self.model_config, attention=attention, num_tokens=num_tokens
        )

    @torch.inference_mode()
    def forward_tree(
        self, input_ids: Tensor, past: DynamicCache, *, visible: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, DynamicCache]:
        """Run ids [1, T] of a tree after `past`; return as `forward_cached` does.

        `visible` [T, T] says which of these tokens each one sees; all see those of `past`.
        `positions` [1, T] are the tokens' positions in the texts of their paths.
        """
        dtype = self.lm_head_weight.dtype
        mask = added_mask(visible, past.get_seq_length(), dtype)
        return self.forward_cached(input_ids, past, valid_mask=mask, positions=positions)

    @torch.inference_mode()
    def keep_entries(self, past: DynamicCache, kept: Sequence[int], *, num_new: int) -> None:
        """Keep only the entries `kept`, ascending, of the newest `num_new`."""
        keep_entries(past, kept, num_new=num_new)

    @torch.inference_mode()
    def run(
        self,
        input_ids: Tensor,
        *,
        past_key_values: DynamicCache | None = None,
        use_cache: bool,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        round_late: bool = False,
        layers: Sequence[int] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run ids [B, T]; return the last state [B, T, H] and those of `layers`, in their order.

        By default these are the aux layers, low to high. With `round_late`, the last aux layer
        passes on its output rounded to bfloat16.
        """
        captured = self.aux_layers if layers is None else layers
        if past_key_values is None or not past_key_values.get_seq_length():
            self.rope.forget(self._decoder)
        with self._captured(captured, round_late=round_late) as states:
            outputs = self._decoder(
                input_ids=input_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                attention_mask=attention_mask,
                position_ids=position_ids,
            )
        last: Tensor = outputs.last_hidden_state.to(self.device)
        return last, [states[layer].to(self.device) for layer in captured]

    def run_each(
        self,
        batches: Iterable[Tensor],
        *,
        round_late: bool = False,
        layers: Sequence[int] | None = None,
    ) -> Iterator[Captured]:
        """Yield the states of batches of ids [B, T], as `run` returns them, one after the other."""
        for ids in batches:
            yield self.run(ids, use_cache=False, round_late=round_late, layers=layers)

    @contextmanager
    def _captured(
        self, captured: Sequence[int], *, round_late: bool
    ) -> Iterator[dict[int, Tensor]]:
        """Collect only the outputs of the layers `captured`, for the passes inside the block.

        With `round_late`, the last aux layer passes on its output rounded to bfloat16.
        """
        states: dict[int, Tensor] = {}
        layers: nn.ModuleList = self._decoder.layers  # type: ignore[assignment]

        def keep(layer: int, output: LayerOutput) -> LayerOutput:
            is_rounded = round_late and layer == self.aux_layers[-1]
            states[layer], output = state_of(output, is_rounded=is_rounded)
            return output

        hooks = [
            layers[layer].register_forward_hook(
                lambda _m, _i, output, layer=layer: keep(layer, output)
            )
            for layer in captured
        ]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Refuse a model whose logits are not lm_head(last): the teacher would be wrong.

        One with NaN weights is refused by that name.
        """
        ids = torch.arange(1, 5, device=self.device).unsqueeze(0)
        expected = self._model(input_ids=ids, use_cache=False).logits
        last, _ = self.run(ids, use_cache=False)
        if not torch.isfinite(expected).all():
            raise CorruptError(
                f"target {self.config.name}: its logits of four tokens are not finite; check the "
                "weights, or set target.dtype to float32"
            )
        if not torch.allclose(self.logits(last), expected, rtol=1e-2, atol=1e-2):
            raise ConfigError(
                f"target {self.config.name}: its logits are not lm_head(last hidden state) (logit "
                "soft-capping or scaling?); this architecture is not supported yet"
            )


def cannot_roll_back(what: str) -> str:
    """Return why `what` is not decoded speculatively, and what to do instead."""
    return (
        f"{what} keeps a recurrent state in its cache, which cannot drop rejected tokens: "
        "speculative decoding would give other texts than plain decoding. Use `eyas run estimate "
        "RECIPE`, which measures acceptance from stored states (after `hidden-states` and `train`)"
    )


def _decoder_of(model: nn.Module, config: TargetConfig, num_layers: int) -> nn.Module:
    """Return the stack of decoder layers; ConfigError if the architecture keeps them elsewhere."""
    decoder = find_decoder(model)
    layers = getattr(decoder, "layers", None)
    if not isinstance(decoder, nn.Module) or not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"target {config.name}: {type(model).__name__} is not supported: expected a decoder "
            f"with a list `layers`, found {type(decoder).__name__}; choose another target"
        )
    if len(layers) != num_layers:
        raise ConfigError(
            f"target {config.name}: {type(decoder).__name__} has {len(layers)} layers, but its "
            f"num_hidden_layers is {num_layers}; this architecture is not supported"
        )
    return decoder


def plain_head(model: nn.Module, config: TargetConfig) -> nn.Module:
    """Return the head; ConfigError if its logits are not those of one plain matrix."""
    head = model.get_output_embeddings()  # type: ignore[operator]  # PreTrainedModel
    if head is None or getattr(head, "bias", None) is not None:
        what = "no head" if head is None else "a head with a bias"
        raise ConfigError(
            f"target {config.name}: {type(model).__name__} has {what}, but training needs logits "
            "that are lm_head(last hidden state); this architecture is not supported yet"
        )
    if not isinstance(head, nn.Module) or head.weight.dtype not in _PLAIN_DTYPES:
        raise ConfigError(
            f"target {config.name}: the head of {type(model).__name__} is quantized; use weights "
            "whose lm_head is not"
        )
    return head
