"""What a target costs, by its config.json alone: sizes, placement, and a layer that is timed.

One layer of each kind is built with random values on the target's device and runs a batch. A token
takes what its layers and the head take.

Shapes: T tokens, H hidden size, V vocabulary.
"""

import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from eagle_core.errors import ConfigError
from eagle_core.safetensors_files import TensorHeader
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.layerwise.layer_slices import kind_of, plain_layers, slice_config
from eagle_core.target.memory.free_memory import ALONE, Memory, MemoryShare
from eagle_core.target.memory.target_bytes import TargetBytes
from eagle_core.target.model_config import read_whole_config, resolve_device, target_dtype
from eagle_core.target.placement import Chosen, place
from eagle_core.target.positions import Positions
from eagle_core.target.skeleton import build_skeleton, certain, silent

_MOST_TOKENS = 2048
"""Of the batch that is timed."""
_ROUNDS = 2
"""The first also pays what happens once."""
_SPREAD = 0.02
_STORED_AS = {"float32": "F32", "float16": "F16"}
"""Of the dtypes in a config.json; others are BF16."""
READ_RATE = 2e9
"""Bytes per second that a disk is expected to read weights with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sketch:
    """A target that is not there."""

    sizes: TargetBytes
    chosen: Chosen | None
    """None if this machine has too little memory."""
    why_none: str
    pass_tokens: int
    """Tokens that pass through a streamed layer together; 0 if the target is not streamed."""
    seconds_per_token: float | None
    """None if there is no placement, or no room for one layer."""
    device: str
    is_quantized: bool
    """Whether its weights take less than is counted."""


def sketch(config: TargetConfig, task_tokens: int, share: MemoryShare = ALONE) -> Sketch:
    """Return what a target would cost on this machine, in a process with a share of its memory.

    No pass of a streamed target takes more than `task_tokens`, the tokens of one task.
    Quantized weights are counted as if they were not. The layers of a streamed target are read
    while others work, at `READ_RATE`: the slower of the two counts. vLLM is taken to be as fast as
    transformers.

    Raises:
        ConfigError: no config.json, or an architecture that is not supported.

    """
    if config.backend == "vllm":  # it has kernels of its own
        config = config.model_copy(update={"attention": "eager"})
    folder = weights.locate_description(config)
    whole = read_whole_config(config, folder)
    sizes = TargetBytes.of(config, whole.get_text_config(), _headers(config, whole))
    chosen: Chosen | None = None
    why_none, pass_tokens, seconds = "", 0, None
    try:
        chosen = place(config, folder, sizes, share)
    except ConfigError as error:
        why_none = str(error)
    else:
        pass_tokens = min(chosen.group_tokens, task_tokens)
        reading = chosen.pass_bytes / READ_RATE / pass_tokens if pass_tokens else 0.0
        if _has_room_for_a_layer(config, sizes, share):
            seconds = max(reading, _computing(config, whole.get_text_config()))
    return Sketch(
        sizes=sizes,
        chosen=chosen,
        why_none=why_none,
        pass_tokens=pass_tokens,
        seconds_per_token=seconds,
        device=str(resolve_device(config.device)),
        is_quantized=getattr(whole, "quantization_config", None) is not None,
    )


def _has_room_for_a_layer(config: TargetConfig, sizes: TargetBytes, share: MemoryShare) -> bool:
    free = Memory.free(resolve_device(config.device), share, most_gpus=1)
    part = max(sizes.layer, sizes.ends)
    return part + sizes.batch(min(_MOST_TOKENS, config.batch_tokens)) <= free.on_device


def _computing(config: TargetConfig, text: PretrainedConfig) -> float:
    """Return the seconds that all layers and the head take per token."""
    num_tokens = min(_MOST_TOKENS, Positions.of(text).limit or _MOST_TOKENS)
    with certain(config, f"layers of a {text.model_type} model cannot be built alone"):
        seconds = sum(
            number * _time_layer(config, text, layer, num_tokens)
            for layer, number in _kinds(plain_layers(config, text))
        )
    return (seconds + _time_head(config, text, num_tokens)) / num_tokens


def _headers(config: TargetConfig, whole: PretrainedConfig) -> dict[str, TensorHeader]:
    """Return what the headers of the weight files would be."""
    model = build_skeleton(config, whole)
    stored = str(whole.get_text_config().dtype or whole.dtype).removeprefix("torch.")
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if _is_tied(whole) else set()
    return {
        name: TensorHeader(dtype=_STORED_AS.get(stored, "BF16"), shape=tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def _is_tied(whole: PretrainedConfig) -> bool:
    return bool(getattr(whole.get_text_config(), "tie_word_embeddings", False))


def _kinds(layers: nn.ModuleList) -> Iterator[tuple[int, int]]:
    """Yield a layer of each kind, and how many there are."""
    found: dict[Hashable, list[int]] = {}
    for number, layer in enumerate(layers):
        found.setdefault(tuple(sorted(kind_of(layer).items(), key=str)), []).append(number)
    yield from ((numbers[0], len(numbers)) for numbers in found.values())


@torch.inference_mode()
def _time_layer(config: TargetConfig, text: PretrainedConfig, layer: int, num_tokens: int) -> float:
    """Return the seconds that a layer takes for a batch."""
    from transformers.initialization import no_init_weights  # noqa: PLC0415 (loads torch models)

    part = slice_config(text, range(layer, layer + 1))
    part.vocab_size, part.pad_token_id = 1, None  # its input is states
    dtype, device = target_dtype(config), resolve_device(config.device)
    with silent(), device, no_init_weights():
        model = AutoModel.from_config(  # type: ignore[no-untyped-call]
            part,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=config.attention,
            dtype=dtype,
        )
    for parameter in model.parameters():
        parameter.uniform_(-_SPREAD, _SPREAD)
    model.train(mode=False)
    states = _random(num_tokens, text.hidden_size, device=device, dtype=dtype)[None]
    return _timed(lambda: model(inputs_embeds=states, use_cache=False), device)


@torch.inference_mode()
def _time_head(config: TargetConfig, text: PretrainedConfig, num_tokens: int) -> float:
    """Return the seconds that the head takes for a batch."""
    dtype, device = target_dtype(config), resolve_device(config.device)
    head = _random(text.vocab_size, text.hidden_size, device=device, dtype=dtype)
    states = _random(num_tokens, text.hidden_size, device=device, dtype=dtype)
    return _timed(lambda: nn.functional.linear(states, head), device)


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, device=device, dtype=dtype).uniform_(-_SPREAD, _SPREAD)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the faster round."""
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
