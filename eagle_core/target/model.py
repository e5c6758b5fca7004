"""The frozen target model, with hooks on its aux layers, and its cached forward passes.

Conventions (docs/design.md, section 4): an aux layer id is the 0-based decoder layer whose *output*
is captured; `last` is the state after the final norm, so that `lm_head(last)` gives the logits.
Loading refuses a model for which that does not hold (logit soft-capping, logit scaling).

Shapes: B batch, T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
)

from eagle_core.bfloat16 import DTYPES
from eagle_core.errors import ConfigError
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import (
    aux_layers,
    read_model_config,
    resolve_device,
)


class TargetModel:
    """A loaded causal language model, never trained, with hooks on its aux layers only."""

    def __init__(
        self, model: nn.Module, *, config: TargetConfig, model_config: PretrainedConfig
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.aux_layers = aux_layers(config, model_config.num_hidden_layers)
        self.device = next(model.parameters()).device
        self._model = model.eval().requires_grad_(requires_grad=False)
        self._decoder: nn.Module = model.get_decoder()  # type: ignore[operator]  # PreTrainedModel
        self._lm_head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self._check_head()

    @classmethod
    def load(cls, config: TargetConfig) -> "TargetModel":
        """Load the target's weights onto its device.

        Raises:
            ConfigError: weights missing, or logits that are not `lm_head(last)`.

        """
        folder = weights.locate(config)
        model_config = read_model_config(config, folder)  # fails before minutes of loading
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[config.dtype],
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
        )
        nn.Module.to(model, resolve_device(config.device))
        return cls(model, config=config, model_config=model_config)

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
        return self._lm_head(last)  # type: ignore[no-any-return]

    @property
    def decodes_batches(self) -> bool:
        """Whether texts of different lengths can share a cache; not with sliding-window layers."""
        return not any(
            getattr(layer, "is_sliding", False)
            for layer in DynamicCache(config=self.model_config).layers
        )

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
    ) -> tuple[Tensor, list[Tensor]]:
        """Run ids [B, T]; return the last state [B, T, H] and those of the aux layers, low to high.

        With `round_late`, the last aux layer passes on its output rounded to bfloat16.
        """
        with self._captured(round_late=round_late) as aux:
            outputs = self._decoder(
                input_ids=input_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                attention_mask=attention_mask,
                position_ids=position_ids,
            )
        return outputs.last_hidden_state, [aux[layer] for layer in self.aux_layers]

    @contextmanager
    def _captured(self, *, round_late: bool) -> Iterator[dict[int, Tensor]]:
        """Collect only the outputs of the aux layers, for the forward passes inside the block.

        With `round_late`, the last aux layer passes on its output rounded to bfloat16.
        """
        states: dict[int, Tensor] = {}
        layers: nn.ModuleList = self._decoder.layers  # type: ignore[assignment]

        def keep(
            layer: int, output: Tensor | tuple[Tensor, ...]
        ) -> Tensor | tuple[Tensor, ...] | None:
            state = output if isinstance(output, Tensor) else output[0]
            states[layer] = state
            if not round_late or layer != self.aux_layers[-1]:
                return None  # passed on unchanged
            states[layer] = state.to(torch.bfloat16).to(state.dtype)
            return states[layer] if isinstance(output, Tensor) else (states[layer], *output[1:])

        hooks = [
            layers[layer].register_forward_hook(
                lambda _m, _i, output, layer=layer: keep(layer, output)
            )
            for layer in self.aux_layers
        ]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Refuse a model whose logits are not lm_head(last): the teacher would be wrong."""
        ids = torch.arange(1, 5, device=self.device).unsqueeze(0)
        expected = self._model(input_ids=ids, use_cache=False).logits
        last, _ = self.run(ids, use_cache=False)
        if not torch.allclose(self.logits(last), expected, rtol=1e-2, atol=1e-2):
            raise ConfigError(
                f"target {self.config.name}: its logits are not lm_head(last hidden state) (logit "
                "soft-capping or scaling?); this architecture is not supported yet"
            )
