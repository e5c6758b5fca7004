"""Real decoding of held-out prompts with drafts of a run that trains, in any process.

The prompts are those that `evaluate` decodes first, with its default settings. For the same
checkpoint both give the same acceptance in float32, or with as many prompts decoded together: in
other arithmetic, rounding depends on what shares a batch.
"""

import os
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from eagle_core.draft.config import DraftConfig
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError
from eagle_core.evaluation.acceptance import AcceptanceReport, summarise
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.decode_prompts import decode_prompts
from eagle_core.evaluation.prompts import Prompt, sample_prompts
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.embedded_tokens import require_embedded
from eagle_core.target.end_weights import load_ends
from eagle_core.target.model import TargetModel
from eagle_core.target.model_config import read_model_config, resolve_device
from eagle_core.target.placement import load_decoding_target, why_not_decoded
from eagle_core.target.positions import Positions
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.token_file import TokenFile
from eagle_core.training.config import TrainingConfig
from eagle_core.training.decoded_points import Decoded

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
_BATCH_PROMPTS = 8
"""Prompts that are decoded together, where the target supports that: their texts are the same."""


def _visible_gpus() -> str:
    every = ",".join(map(str, range(torch.cuda.device_count())))
    return os.environ.get(VISIBLE_GPUS, every)


class DecodingPlace(BaseModel):
    """Where drafts are decoded, and what training does meanwhile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    is_child: bool
    """Whether a child process decodes."""
    is_awaited: bool
    """Whether training waits, because it uses the same device."""
    visible_gpus: str = Field(default_factory=_visible_gpus)
    """CUDA_VISIBLE_DEVICES as this machine shows its GPUs to the process that chose the device."""


class DraftsToDecode(BaseModel):
    """What to decode, with all drafts of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: TargetConfig
    """On the device to decode on."""
    draft: DraftConfig
    prompts: tuple[tuple[int, ...], ...]
    """Token ids."""
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    place: DecodingPlace

    @property
    def config(self) -> EvaluationConfig:
        """How to decode: as `evaluate` does, but not plainly."""
        return EvaluationConfig(
            num_prompts=len(self.prompts), max_new_tokens=self.max_new_tokens, num_plain_prompts=0
        )

    @property
    def digest(self) -> str:
        """Identify the prompts and the settings that decide what is accepted."""
        settings = self.model_dump_json(include={"prompts", "stop_ids", "max_new_tokens"})
        return xxhash.xxh3_128_hexdigest(f"{settings} {self.config.draft_tokens}".encode())


def drafts_to_decode(
    target: TargetConfig, training: TrainingConfig, draft: DraftConfig, held_out: Path
) -> DraftsToDecode | None:
    """Return what a run decodes while it trains; None if it decodes nothing.

    Args:
        target: as the recipe has it: `evaluate` decides what it leaves open in the same way.
        training: settings of the run.
        draft: sizes of its draft.
        held_out: the token file of the held-out samples.

    Raises:
        ConfigError: no held-out sample has a prompt that fits.

    """
    if not training.decode_every:
        return None
    place = decoding_place(target, training)
    return DraftsToDecode(
        target=target.model_copy(update={"device": place.device}),
        draft=draft,
        prompts=tuple(prompt.input_ids for prompt in _prompts(target, training, held_out)),
        stop_ids=tuple(sorted(conversation_tokenizer(target).stop_ids)),
        max_new_tokens=training.decode_new_tokens,
        place=place,
    )


def _prompts(target: TargetConfig, training: TrainingConfig, held_out: Path) -> list[Prompt]:
    """Return the first held-out prompts that leave room for their answers."""
    model_config = read_model_config(target, weights.locate(target))
    positions, longest = Positions.of(model_config), EvaluationConfig().max_prompt_tokens
    if positions.limit is not None and not positions.is_scaled:
        room = EvaluationConfig(max_new_tokens=training.decode_new_tokens).positions_after_prompt
        longest = min(longest, positions.limit - room)
    prompts = sample_prompts(
        TokenFile(held_out), num_prompts=training.decode_prompts, max_tokens=longest
    )
    if not prompts:
        raise ConfigError(
            f"training.decode_every is {training.decode_every}, but no held-out sample has a "
            f"prompt of 1 to {longest} tokens to decode: hold samples out "
            "(dataset.held_out_fraction), lower training.decode_new_tokens, or set "
            "training.decode_every to 0"
        )
    for prompt in prompts:
        require_embedded(prompt.input_ids, model_config.vocab_size, target, where="a prompt")
    return prompts


def decoding_place(target: TargetConfig, training: TrainingConfig) -> DecodingPlace:
    """Return where drafts of a run are decoded on this machine."""
    if training.decode_device != "auto":
        return DecodingPlace(device=training.decode_device, is_child=True, is_awaited=False)
    device = _unused_gpu(target, training)
    if device is not None:
        return DecodingPlace(device=device, is_child=True, is_awaited=False)
    # With several processes, this one must go on telling the others that it is alive.
    is_child = training.world_size > 1
    return DecodingPlace(device=target.device, is_child=is_child, is_awaited=True)


def require_decoding_place(target: TargetConfig, training: TrainingConfig) -> None:
    """Raise ConfigError unless the target can be decoded where drafts of a run are decoded."""
    device = decoding_place(target, training).device
    resolved = resolve_device(device)
    num_gpus = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= num_gpus:
        raise ConfigError(
            f"training.decode_device is {device}, but this machine shows {num_gpus} GPUs "
            "(CUDA_VISIBLE_DEVICES counts); name another device, or auto"
        )
    obstacle = why_not_decoded(target.model_copy(update={"device": device}))
    if obstacle:
        raise ConfigError(f"target {target.name}: {obstacle}")


def _unused_gpu(target: TargetConfig, training: TrainingConfig) -> str | None:
    """Return a GPU that training leaves free and that can decode the target, if there is one."""
    device = resolve_device(target.device)
    if device.type != "cuda":
        return None
    is_single = training.world_size == 1
    used = {device.index or 0} if is_single else set(range(training.num_processes))
    for number in range(torch.cuda.device_count()):
        name = f"cuda:{number}"
        if number not in used and not why_not_decoded(target.model_copy(update={"device": name})):
            return name
    return None


class DraftDecoder:
    """Decodes with one draft after the other; the target is loaded at the first."""

    def __init__(
        self, work: DraftsToDecode, load_target: Callable[[], TargetModel] | None = None
    ) -> None:
        """Decode `work`, with a target of another owner if `load_target` returns one."""
        self._work = work
        self._load_target = load_target or partial(load_decoding_target, work.target)

    def decode(self, tensors: Mapping[str, Tensor]) -> Decoded:
        """Decode all prompts with the draft of these weights, which lack the target's own.

        Raises:
            ConfigError: the device has too little memory.

        """
        try:
            self._draft.load_tensors({**tensors, **self._draft.target_tensors()})
            return _decoded(self._decode())
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"decoding while training: {error}; name a device with more memory "
                "(training.decode_device), or set training.decode_every to 0"
            ) from error

    def _decode(self) -> AcceptanceReport:
        together = min(len(self._work.prompts), _BATCH_PROMPTS)
        config = self._work.config.model_copy(
            update={"batch_prompts": together if self._target.decodes_batches else 1}
        )
        results = decode_prompts(
            self._target,
            self._draft,
            [Prompt(input_ids=ids) for ids in self._work.prompts],
            config,
            stop_ids=self._work.stop_ids,
        )
        return summarise(list(results), draft_tokens=config.draft_tokens)

    @cached_property
    def _target(self) -> TargetModel:
        return self._load_target()

    @cached_property
    def _draft(self) -> DraftModel:
        """A draft apart from the one that trains, with what is the target's own."""
        folder = weights.locate(self._work.target)
        draft = DraftModel(self._work.draft)
        embedding, lm_head = load_ends(folder, dtype=torch.float32)
        draft.take_target_tensors(embedding=embedding, lm_head=lm_head)
        return draft.to(self._target.device)


def _decoded(report: AcceptanceReport) -> Decoded:
    """Return what is recorded of a report: only depths that were reached have a share."""
    reached = [share for share in report.acceptance_by_depth if share == share]  # noqa: PLR0124 (NaN)
    return Decoded(
        acceptance_length=report.acceptance_length if report.num_rounds else 0.0,
        acceptance_by_depth=tuple(reached),
    )
