"""Run a target of which one decoder layer at a time is on the device.

All batches of a group pass through a layer before the next one takes its place. Each batch runs the
decoder's own forward pass, in a greenlet that waits in front of every layer: masks, positions and
the order of operations are those of the whole model, and so are the bits of the states. Meanwhile a
thread reads the next layer's weights.

Shapes: B batch, T tokens, H hidden size, V vocabulary.
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from eagle_core.bfloat16 import DTYPES
from eagle_core.errors import ConfigError
from eagle_core.safetensors_files import tensor_files
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.decoder import find_decoder
from eagle_core.target.end_weights import load_ends
from eagle_core.target.layer_slices import (
    build_ends,
    build_slice,
    plain_layers,
    require_chain,
    require_own_layers,
    slice_tensors,
)
from eagle_core.target.length_rope import LengthRope
from eagle_core.target.model import Captured, plain_head
from eagle_core.target.model_config import aux_layers, read_whole_config, resolve_device
from eagle_core.target.skeleton import certain

CURE = "set target.placement to whole or spread"
OnTokens = Callable[[int], None]
"""Called with a number of tokens: the share of a pass that is done since the last call."""
_FEW_ROWS = 8
"""Of the embedding of a model that shows how its class makes logits."""
_LARGE = 100.0


def require_streamable(config: TargetConfig, whole: PretrainedConfig) -> None:
    """Raise ConfigError, with the cure, if a target of this configuration cannot be streamed."""
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


@dataclass(kw_only=True, slots=True)
class PassTimes:
    """What passes took so far, in seconds."""

    total: float = 0.0
    reading: float = 0.0
    """In which a thread read weights, while a layer ran."""
    placing: float = 0.0
    """In which layers were put on the device."""
    running: float = 0.0
    """In which layers ran."""
    num_tokens: int = 0
    num_passes: int = 0

    def seconds(self, num_tokens: int) -> float:
        """Return what a pass of `num_tokens` takes by these times."""
        running = self.running / max(self.num_tokens, 1) * num_tokens
        passes = max(self.num_passes, 1)
        return max(self.reading / passes, running) + self.placing / passes


class StreamedTarget:
    """A causal language model, never trained; only embedding, norm and head stay in memory."""

    def __init__(
        self,
        decoder: nn.Module,
        lm_head: Tensor,
        layers: "_Layers",
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
        require_streamable(config, with_others)
        device, files = resolve_device(config.device), tensor_files(folder)
        with certain(config, f"a {whole.model_type} model cannot be run layer by layer"):
            _require_plain_logits(config, whole)
            slots = [_Slot(layer) for layer in plain_layers(config, whole)]
            decoder = build_ends(config, whole, slice_tensors(files, folder, range(0)))
            decoder.layers = nn.ModuleList(slots)
            decoder.config.num_hidden_layers = len(slots)
            embedding, lm_head = load_ends(folder, dtype=DTYPES[config.dtype])
        nn.Module.to(decoder, device)
        if lm_head is embedding:  # tied: it is in memory once
            lm_head = decoder.get_input_embeddings().weight.detach()  # type: ignore[operator]
        return cls(
            decoder,
            lm_head.to(device),
            _Layers(slots, config=config, whole=whole, files=files, folder=folder, device=device),
            config=config,
            model_config=whole,
            group_tokens=group_tokens,
            states_wait_in_main=states_wait_in_main,
            on_tokens=on_tokens,
        )

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
            _Pass(
                self._decoder,
                ids,
                captured,
                rounded=rounded,
                waits_in_main=self._states_wait_in_main,
            )
            for ids in group
        ]
        done, started = (
            _Done(self.model_config.num_hidden_layers, self._on_tokens),
            time.monotonic(),
        )
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


class _Pass(greenlet):
    """One batch on its way through the decoder."""

    last: Tensor

    def __init__(
        self,
        decoder: nn.Module,
        ids: Tensor,
        captured: Sequence[int],
        *,
        rounded: int | None,
        waits_in_main: bool,
    ) -> None:
        super().__init__()
        self._decoder, self._ids = decoder, ids
        self.num_tokens = ids.numel()
        self._captured, self._rounded = captured, rounded
        self._in_main = _InMain() if waits_in_main else None
        self.states: dict[int, Tensor] = {}

    def run(self) -> None:
        """Run the decoder's own forward pass."""
        output = self._decoder(input_ids=self._ids, use_cache=False)
        self.last = output.last_hidden_state.cpu()

    def wait(self, state: Tensor) -> None:
        """Let the others pass, until the next layer is loaded. `state` is what it will read."""
        assert self.parent is not None  # noqa: S101
        if self._in_main is None:
            self.parent.switch()
            return
        with self._in_main.keeping(state):
            self.parent.switch()

    def passed(
        self, layer: int, output: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...]:
        """Keep the output of a layer if it is wanted; return what the next layer reads."""
        state = output if isinstance(output, Tensor) else output[0]
        if layer == self._rounded:
            state = state.to(torch.bfloat16).to(state.dtype)
            output = state if isinstance(output, Tensor) else (state, *output[1:])
        if layer in self._captured:
            self.states[layer] = state.to("cpu", copy=self._in_main is not None)
        return output


class _InMain:
    """A place in main memory for the state of one batch."""

    def __init__(self) -> None:
        self._copy: Tensor | None = None

    @contextmanager
    def keeping(self, state: Tensor) -> Iterator[None]:
        """Hold the values of `state` within the block; its own memory is free for others."""
        if self._copy is None:
            self._copy = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda)
        self._copy.copy_(state, non_blocking=True)
        storage = state.untyped_storage()
        num_bytes = storage.nbytes()
        storage.resize_(0)  # the frames that wait still refer to the tensor
        yield
        storage.resize_(num_bytes)
        state.copy_(self._copy, non_blocking=True)


class _Slot(nn.Module):
    """The place of a layer in the decoder: a batch waits here until the layer is loaded."""

    def __init__(self, plain: nn.Module) -> None:
        """Answer for the layer `plain`, which has no weights: decoders read its kind."""
        super().__init__()
        object.__setattr__(self, "_plain", plain)  # no part of the module: it cannot be moved
        self.number = 0
        self.loaded: list[nn.Module] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (as torch has it)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_plain"], name)

    def forward(self, *inputs: object, **named: object) -> Tensor | tuple[Tensor, ...]:
        """Wait for the layer, and pass through it."""
        batch = getcurrent()
        assert isinstance(batch, _Pass)  # noqa: S101
        state = inputs[0] if inputs else named["hidden_states"]
        assert isinstance(state, Tensor)  # noqa: S101
        batch.wait(state)
        return batch.passed(self.number, self.loaded[0](*inputs, **named))


class _Layers:
    """Loads one layer after the other into its slot."""

    def __init__(
        self,
        slots: Sequence[_Slot],
        *,
        config: TargetConfig,
        whole: PretrainedConfig,
        files: Mapping[str, Path],
        folder: Path,
        device: torch.device,
    ) -> None:
        for number, slot in enumerate(slots):
            slot.number = number
        self._slots, self._config, self._whole = slots, config, whole
        self._files, self._folder, self._device = files, folder, device
        self.times = PassTimes()

    def in_turn(self) -> Iterator[int]:
        """Yield 1 with the first layer in its slot, 2 with the second, and so on."""
        with ThreadPoolExecutor(1, thread_name_prefix="layer-reader") as reader:
            ahead = reader.submit(self._read, 0)
            for number, slot in enumerate(self._slots):
                tensors = ahead.result()
                began = time.monotonic()
                if number + 1 < len(self._slots):
                    ahead = reader.submit(self._read, number + 1)
                slot.loaded = [self._built(number, tensors)]
                del tensors
                self.times.placing += time.monotonic() - began
                try:
                    yield number + 1
                finally:
                    slot.loaded = []

    def _read(self, number: int) -> dict[str, Tensor]:
        """Read the weights of a layer from disk; only mapped, they would be read when used."""
        began = time.monotonic()
        layers = range(number, number + 1)
        is_pinned = self._device.type == "cuda"
        tensors = {
            name: tensor.pin_memory() if is_pinned else tensor.clone()
            for name, tensor in slice_tensors(
                self._files, self._folder, layers, with_embedding=False
            ).items()
        }
        self.times.reading += time.monotonic() - began
        return tensors

    def _built(self, number: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        part = build_slice(self._config, self._whole, tensors, range(number, number + 1))
        layers: nn.ModuleList = part.layers  # type: ignore[assignment]
        layer = layers[0]
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]
        return layer.to(self._device, non_blocking=True)


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
