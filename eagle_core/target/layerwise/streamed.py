"""Run a target of which one decoder layer at a time is on the device.

All batches of a group pass through a layer before the next one takes its place. Each batch runs the
decoder's own forward pass, in a greenlet that waits in front of every layer: masks, positions and
the order of operations are those of the whole model, and so are the bits of the states. Meanwhile a
thread reads the next layer's weights.

Shapes: B batch, T tokens, H hidden size, V vocabulary.
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from eagle_core.errors import ConfigError
from eagle_core.safetensors_files import tensor_files
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.decoder import find_decoder
from eagle_core.target.end_weights import load_ends
from eagle_core.target.layerwise.layer_loader import LayerLoader, PassTimes
from eagle_core.target.layerwise.layer_pass import LayerPass, LayerSlot
from eagle_core.target.layerwise.layer_slices import (
    build_ends,
    plain_layers,
    require_chain,
    require_own_layers,
    slice_tensors,
)
from eagle_core.target.length_rope import LengthRope
from eagle_core.target.model import Captured, plain_head
from eagle_core.target.model_config import (
    aux_layers,
    read_whole_config,
    resolve_device,
    target_dtype,
)
from eagle_core.target.skeleton import certain

CURE = "set target.placement to whole or spread"
OnTokens = Callable[[int], None]
"""Called with a number of tokens: the share of a pass that is done since the last call."""
_FEW_ROWS = 8
"""Of the embedding of a model that shows how its class makes logits."""
_LARGE = 100.0


def streamable_layers(config: TargetConfig, whole: PretrainedConfig) -> nn.ModuleList:
    """Return the layers of a target of this configuration, without values.

    Raises:
        ConfigError: it cannot be streamed; says what to do instead.

    """
    text: PretrainedConfig = whole.get_text_config()
    require_chain(text, cure=CURE)
    if getattr(whole, "quantization_config", None) is not None:
        raise ConfigError(
            f"target {config.name}: its weights are quantized, and such a target cannot be run "
            f"layer by layer yet; {CURE}, or use weights that are not quantized"
        )
    layers = plain_layers(config, text)
    each = (range(number, number + 1) for number in range(len(layers)))
    require_own_layers(config, text, layers, each, cure=CURE)
    return layers


class StreamedTarget:
    """A causal language model, never trained; only embedding, norm and head stay in memory."""

    def __init__(
        self,
        decoder: nn.Module,
        lm_head: Tensor,
        layers: LayerLoader,
        *,
        config: TargetConfig,
        model_config: PretrainedConfig,
        group_tokens: int,
        states_wait_in_main: bool,
        on_tokens: OnTokens,
    ) -> None:
        """Use `StreamedTarget.load` instead."""
        self.config = config
        self.model_config = model_config
        self.aux_layers = aux_layers(config, model_config.num_hidden_layers)
        self.rope = LengthRope.of(model_config)
        self.device = lm_head.device
        self._lm_head = lm_head
        self.pass_tokens = group_tokens
        self._states_wait_in_main = states_wait_in_main
        self._decoder, self._layers, self._on_tokens = decoder, layers, on_tokens

    @classmethod
    def load(
        cls,
        config: TargetConfig,
        *,
        group_tokens: int,
        states_wait_in_main: bool = False,
        on_tokens: OnTokens = lambda _tokens: None,
    ) -> "StreamedTarget":
        """Load what stays in memory onto the target's device.

        Args:
            config: the target.
            group_tokens: tokens that pass through a layer before the next one is loaded.
            states_wait_in_main: whether states between layers leave the device.
            on_tokens: called after each batch in each layer, with that part of its tokens.

        Raises:
            ConfigError: no weights, quantised ones, an architecture whose layers are not a chain,
                or logits that are not `lm_head(last)`.

        """
        folder = weights.locate(config)
        with_others = read_whole_config(config, folder)
        whole: PretrainedConfig = with_others.get_text_config()
        layers = streamable_layers(config, with_others)
        device, files = resolve_device(config.device), tensor_files(folder)
        with certain(config, f"a {whole.model_type} model cannot be run layer by layer"):
            _require_plain_logits(config, whole)
            slots = [LayerSlot(layer) for layer in layers]
            decoder = build_ends(config, whole, slice_tensors(files, folder, range(0)))
            decoder.layers = nn.ModuleList(slots)
            decoder.config.num_hidden_layers = len(slots)
            embedding, lm_head = load_ends(folder, dtype=target_dtype(config))
        nn.Module.to(decoder, device)
        if lm_head is embedding:  # tied: it is in memory once
            lm_head = decoder.get_input_embeddings().weight.detach()  # type: ignore[operator]
        return cls(
            decoder,
            lm_head.to(device),
            LayerLoader(
                slots, config=config, whole=whole, files=files, folder=folder, device=device
            ),
            config=config,
            model_config=whole,
            group_tokens=group_tokens,
            states_wait_in_main=states_wait_in_main,
            on_tokens=on_tokens,
        )

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch, padding included."""
        return self.config.batch_tokens

    @property
    def times(self) -> PassTimes:
        """What passes took since loading, or since `forget_times`."""
        return self._layers.times

    def forget_times(self) -> None:
        """Measure anew."""
        self._layers.times = PassTimes()

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, H] the head that turns `last` into logits."""
        return self._lm_head

    def logits(self, last: Tensor) -> Tensor:
        """Return the target's logits [..., V] for post-norm states [..., H]."""
        return nn.functional.linear(last.to(self.device), self._lm_head)

    def run_each(
        self,
        batches: Iterable[Tensor],
        *,
        round_late: bool = False,
        layers: Sequence[int] | None = None,
    ) -> Iterator[Captured]:
        """Yield what `TargetModel.run_each` does, to the bit, for batches of ids [B, T].

        Batches are read ahead until they have `pass_tokens` tokens; at least one is.
        """
        group: list[Tensor] = []
        for ids in batches:
            if group and sum(map(Tensor.numel, group)) + ids.numel() > self.pass_tokens:
                yield from self._run_group(group, round_late=round_late, layers=layers)
                group = []
            group.append(ids)
        if group:
            yield from self._run_group(group, round_late=round_late, layers=layers)

    @torch.inference_mode()
    def _run_group(
        self, group: Sequence[Tensor], *, round_late: bool, layers: Sequence[int] | None
    ) -> list[Captured]:
        captured = self.aux_layers if layers is None else tuple(layers)
        rounded = self.aux_layers[-1] if round_late else None
        passes = [
            LayerPass(
                self._decoder,
                ids,
                captured,
                rounded=rounded,
                waits_in_main=self._states_wait_in_main,
            )
            for ids in group
        ]
        started = time.monotonic()
        done = _Done(self.model_config.num_hidden_layers, self._on_tokens)
        for one in passes:  # up to the first layer
            self.rope.forget(self._decoder)
            one.switch()
        for _ in self._layers.in_turn():
            began = time.monotonic()
            for one in passes:
                one.switch()
                done.add(one.num_tokens)
            _synchronize(self.device)
            self.times.running += time.monotonic() - began
        self.times.num_tokens += sum(one.num_tokens for one in passes)
        self.times.num_passes += 1
        self.times.total += time.monotonic() - started
        return [(one.last, [one.states[layer] for layer in captured]) for one in passes]


class _Done:
    """Calls `on_tokens` as batches pass through layers: each layer is a part of its tokens."""

    def __init__(self, num_layers: int, on_tokens: OnTokens) -> None:
        self._num_layers, self._on_tokens = num_layers, on_tokens
        self._passed = 0

    def add(self, num_tokens: int) -> None:
        """Count a batch that passed one layer."""
        before = self._passed // self._num_layers
        self._passed += num_tokens
        self._on_tokens(self._passed // self._num_layers - before)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _require_plain_logits(config: TargetConfig, whole: PretrainedConfig) -> None:
    """Refuse a class whose logits are not lm_head(last): the teacher would be wrong.

    A model without layers and with few embeddings shows it.
    """
    part = copy.deepcopy(whole)
    part.num_hidden_layers, part.vocab_size, part.pad_token_id = 0, _FEW_ROWS, None
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        part, trust_remote_code=config.trust_remote_code, attn_implementation=config.attention
    )
    model.train(mode=False)
    ids = torch.arange(_FEW_ROWS).unsqueeze(0)
    decoder = find_decoder(model)
    assert decoder is not None  # noqa: S101
    with torch.inference_mode():
        head = plain_head(model, config)
        head.weight.mul_(_LARGE)  # type: ignore[operator]  # a soft cap changes large logits only
        expected = model(input_ids=ids, use_cache=False).logits
        found = head(decoder(input_ids=ids).last_hidden_state)
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"target {config.name}: its logits are not lm_head(last hidden state) (logit "
            "soft-capping or scaling?); this architecture is not supported yet"
        )
