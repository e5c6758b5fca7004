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
from eagle_core.target.free_memory import ALONE, Memory, MemoryShare
from eagle_core.target.layer_slices import kind_of, plain_layers, slice_config
from eagle_core.target.model_config import read_whole_config, resolve_device, target_dtype
from eagle_core.target.placement import Chosen, choose_placement
from eagle_core.target.skeleton import build_skeleton, certain, silent
from eagle_core.target.target_bytes import TargetBytes

_TOKENS = 2048
"""Of the batch that is timed."""
_ROUNDS = 2
"""The first also pays what happens once."""
_SPREAD = 0.02
_STORED_AS = "BF16"
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
    seconds_per_token: float
    device: str


def sketch(config: TargetConfig, task_tokens: int, share: MemoryShare = ALONE) -> Sketch:
    """Return what a target would cost on this machine, in a process with a share of its memory.

    No pass of a streamed target takes more than `task_tokens`, the tokens of one task.
    Quantized weights are counted as if they were not. The layers of a streamed target are read
    while others work, at `READ_RATE`: the slower of the two counts.

    Raises:
        ConfigError: no config.json, or an architecture that is not supported.

    """
    whole = read_whole_config(config, weights.locate_description(config))
    text: PretrainedConfig = whole.get_text_config()
    device = resolve_device(config.device)
    sizes = TargetBytes.of(config, text, _headers(config, whole))
    chosen, why_none = _placed(config, sizes, Memory.free(device, share))
    with certain(config, f"layers of a {text.model_type} model cannot be built alone"):
        seconds = sum(
            number * _time_layer(config, text, layer, device)
            for layer, number in _kinds(plain_layers(config, text))
        )
    pass_tokens = min(chosen.group_tokens, task_tokens) if chosen else 0
    computing = (seconds + _time_head(config, text, device)) / _TOKENS
    return Sketch(
        sizes=sizes,
        chosen=chosen,
        why_none=why_none,
        pass_tokens=pass_tokens,
        seconds_per_token=max(computing, _reading_seconds(chosen, pass_tokens)),
        device=str(device),
    )


def _placed(config: TargetConfig, sizes: TargetBytes, free: Memory) -> tuple[Chosen | None, str]:
    """Return the placement, or why there is none."""
    if config.backend == "vllm":
        return Chosen(placement="vllm", reason="target.backend is vllm"), ""
    try:
        return choose_placement(config, sizes, free), ""
    except ConfigError as error:
        return None, str(error)


def _reading_seconds(chosen: Chosen | None, pass_tokens: int) -> float:
    """Return the seconds per token in which the weights of a streamed target are read."""
    if chosen is None or not pass_tokens:
        return 0.0
    return chosen.pass_bytes / READ_RATE / pass_tokens


def _headers(config: TargetConfig, whole: PretrainedConfig) -> dict[str, TensorHeader]:
    """Return what the headers of the weight files would be."""
    model = build_skeleton(config, whole)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if _is_tied(whole) else set()
    return {
        name: TensorHeader(dtype=_STORED_AS, shape=tuple(tensor.shape))
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
def _time_layer(
    config: TargetConfig, text: PretrainedConfig, layer: int, device: torch.device
) -> float:
    """Return the seconds that a layer takes for a batch."""
    from transformers.initialization import no_init_weights  # noqa: PLC0415 (loads torch models)

    part = slice_config(text, range(layer, layer + 1))
    part.vocab_size, part.pad_token_id = 1, None  # its input is states
    dtype = target_dtype(config)
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
    states = _random(_TOKENS, text.hidden_size, device=device, dtype=dtype)[None]
    return _timed(lambda: model(inputs_embeds=states, use_cache=False), device)


@torch.inference_mode()
def _time_head(config: TargetConfig, text: PretrainedConfig, device: torch.device) -> float:
    """Return the seconds that the head takes for a batch."""
    dtype = target_dtype(config)
    head = _random(text.vocab_size, text.hidden_size, device=device, dtype=dtype)
    states = _random(_TOKENS, text.hidden_size, device=device, dtype=dtype)
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
