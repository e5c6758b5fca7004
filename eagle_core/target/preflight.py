"""Check a target in seconds, before anything is tokenised: nothing that fails later for certain.

Reads config.json, the index, the headers of the weight files and the tokenizer, and builds the
model without weights. It refuses by name what cannot work, and never reads a weight.
"""

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from transformers import PretrainedConfig

from eagle_core.data.conversation import Conversation, Message
from eagle_core.data.ledger import RejectedRecord
from eagle_core.errors import ConfigError
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.end_weights import require_ends
from eagle_core.target.engine.vllm_python import require_vllm
from eagle_core.target.layerwise.streamed import streamable_layers
from eagle_core.target.length_rope import LengthRope
from eagle_core.target.loading import rehearse_loading
from eagle_core.target.model import TargetModel, cannot_roll_back, plain_head
from eagle_core.target.model_config import aux_layers, read_whole_config
from eagle_core.target.positions import Positions
from eagle_core.target.skeleton import build_skeleton, certain
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOGIT_KEYS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings that make logits other than lm_head(last), unless they are absent or 1."""
_NUM_IDS = 4
CapturedWhere = Literal["here", "on workers"] | None

logger = logging.getLogger(__name__)


def check_weights(config: TargetConfig) -> Path:
    """Return the target's folder if its weight files are whole.

    Raises:
        ConfigError: a file is missing.
        CorruptError: a file is empty, cut or a Git LFS pointer.

    """
    folder = weights.locate(config)
    weights.read_weight_headers(config, folder)
    return folder


def check_target(
    config: TargetConfig,
    *,
    max_length: int | None = None,
    runs_here: bool = True,
    rolls_back: bool = False,
    captured: CapturedWhere = "here",
) -> None:
    """Raise unless the target can be loaded, and gives states that mean something.

    Args:
        config: the target.
        max_length: tokens of the longest sample; None if no sample is captured.
        runs_here: whether the target runs in this environment; elsewhere, other attention kernels
            and quantisation packages may be installed.
        rolls_back: whether decoding drops tokens from its cache again.
        captured: where its backend computes states; None if only decoding runs the target.

    Raises:
        ConfigError: an unsupported architecture, attention kernel, quantisation or placement, no
            vLLM where that is the backend, too few positions, or a tokenizer with tokens that have
            no embedding.
        CorruptError: weights are missing, left over, cut, or of another shape; names them.

    """
    folder = weights.locate(config)
    headers = weights.read_weight_headers(config, folder)
    by_vllm = config.backend == "vllm" and captured is not None
    if by_vllm and captured == "here":
        require_vllm(config)
    if by_vllm and not rolls_back:
        runs_here = False  # by transformers
    if not runs_here:
        config = _with_any_kernel(config)
    whole, skeleton = _described(config, folder, max_length=max_length, rolls_back=rolls_back)
    if by_vllm:
        _require_one_rope(config, whole.get_text_config())
    require_ends(headers, folder)
    if runs_here or getattr(whole, "quantization_config", None) is None:
        rehearsed = rehearse_loading(config, whole, skeleton, headers, folder)
        if rehearsed is not None:
            plain_head(rehearsed, config)


def check_description(config: TargetConfig, *, max_length: int) -> None:
    """Raise ConfigError for what `check_target` refuses by config.json and tokenizer alone."""
    if config.backend == "vllm":
        require_vllm(config)
        config = _with_any_kernel(config)
    folder = weights.locate_description(config)
    whole, _ = _described(config, folder, max_length=max_length, rolls_back=False)
    if config.backend == "vllm":
        _require_one_rope(config, whole.get_text_config())


def _require_one_rope(config: TargetConfig, text: PretrainedConfig) -> None:
    """Refuse frequencies that depend on each text: vLLM chooses them once, by its longest one."""
    if LengthRope.of(text) != LengthRope():
        raise ConfigError(
            f"target {config.name}: its RoPE has other frequencies for long texts (longrope or "
            "dynamic), and vLLM chooses one set for all texts, so its states would differ; set "
            "target.backend to transformers"
        )


def _with_any_kernel(config: TargetConfig) -> TargetConfig:
    """Return a target that can be built where its kernel of attention is not installed."""
    return config.model_copy(update={"attention": "eager"})


def _described(
    config: TargetConfig,
    folder: Path,
    *,
    max_length: int | None,
    rolls_back: bool,
) -> tuple[PretrainedConfig, "PreTrainedModel"]:
    """Return configuration and model, without values, of a target that may work."""
    whole = read_whole_config(config, folder)
    text: PretrainedConfig = whole.get_text_config()
    if max_length is not None:  # vLLM also writes one token
        by_vllm = config.backend == "vllm"
        Positions.of(text).require(max_length + by_vllm, config, setting="dataset.max_length")
    _require_plain_logits(config, text)
    if config.placement == "streamed":
        streamable_layers(config, whole)
    skeleton = build_skeleton(config, whole)
    _require_runnable(config, skeleton, text, rolls_back=rolls_back)
    _check_tokens(config, num_rows=text.vocab_size)
    return whole, skeleton


def _require_plain_logits(config: TargetConfig, text: PretrainedConfig) -> None:
    for key in _LOGIT_KEYS:
        value = getattr(text, key, None)
        if value not in {None, 1} and _is_setting(text, key):
            raise ConfigError(
                f"target {config.name}: its logits are not lm_head(last hidden state) ({key} is "
                f"{value}); this architecture is not supported yet"
            )


def _is_setting(text: PretrainedConfig, key: str) -> bool:
    """Return whether this architecture has such a setting; others keep the key, and ignore it."""
    return not dataclasses.is_dataclass(text) or any(
        field.name == key for field in dataclasses.fields(text)
    )


def _require_runnable(
    config: TargetConfig, skeleton: "PreTrainedModel", text: PretrainedConfig, *, rolls_back: bool
) -> None:
    """Run the model without values: its layers must give what is captured, its cache roll back."""
    num_layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(num_layers, int):
        raise ConfigError(
            f"target {config.name}: config.json has no num_hidden_layers: {type(skeleton).__name__}"
            " is not supported"
        )
    aux_layers(config, num_layers)
    name = type(skeleton).__name__
    with certain(config, f"{name} is not supported"):
        target = TargetModel(skeleton, config=config, model_config=text)
        # Other kernels look at the values of a mask, and without a mask at those of positions.
        skeleton.set_attn_implementation("eager")
        shapes = _shapes_of_states(target)
        can_roll_back = not rolls_back or _may_roll_back(target)
    expected = (1, _NUM_IDS, text.hidden_size)
    if shapes - {expected}:
        raise ConfigError(
            f"target {config.name}: the layers of {name} give states of shapes {sorted(shapes)}, "
            f"expected {expected}: this architecture is not supported"
        )
    if not can_roll_back:
        raise ConfigError(cannot_roll_back(f"target {config.name} ({name})"))


def _shapes_of_states(target: TargetModel) -> set[tuple[int, ...]]:
    """Return the shapes of the states of a model without values; empty if it needs values."""
    ids = torch.ones(1, _NUM_IDS, dtype=torch.int64, device="meta")
    try:
        last, aux = target.run(ids, use_cache=False, attention_mask=torch.ones_like(ids))
    except RuntimeError as error:
        logger.debug("target %s does not run without values: %s", target.config.name, error)
        return set()
    return {tuple(state.shape) for state in (last, *aux)}


def _may_roll_back(target: TargetModel) -> bool:
    """Return False if the cache of a model without values cannot drop tokens again."""
    try:
        return target.can_roll_back
    except RuntimeError as error:
        logger.debug("target %s does not decode without values: %s", target.config.name, error)
        return True


def _check_tokens(config: TargetConfig, *, num_rows: int) -> None:
    """Refuse an unusable template, and one whose tokens have no embedding; warn of other tokens.

    Some tokenizers have tokens for other members of the family: Gemma 3 1B's has one for images.
    """
    conversations = conversation_tokenizer(config)
    beyond = conversations.tokens_from(num_rows)
    if not beyond:
        return
    used = _written_tokens(conversations)
    number = min(beyond.keys() & used, default=min(beyond))
    what = f"target {config.name}: the tokenizer's {beyond[number]} is token {number}, but the "
    what += f"embedding has {num_rows:,} rows (vocab_size)"
    if number in used:
        raise ConfigError(
            f"{what}, and every conversation contains it; use the tokenizer that belongs to these "
            "weights, or resize the embedding of the model and save it"
        )
    logger.warning("%s: a conversation that contains it is refused", what)


def _written_tokens(conversations: ConversationTokenizer) -> set[int]:
    """Return the ids of one plain conversation; empty if the template takes none."""
    conversation = Conversation(
        conversation_id="plain",
        messages=(
            Message(role="user", content="Hello."),
            Message(role="assistant", content="Hello."),
        ),
    )
    try:
        samples = conversations.tokenize(conversation)
    except RejectedRecord as error:
        logger.debug("the template takes no plain conversation: %s", error)
        return set()
    return {number for sample in samples for number in sample.input_ids.tolist()}
