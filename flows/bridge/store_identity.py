"""The identity of a store: target, tokenizer, template and profile of its states."""

import logging
from collections.abc import Mapping
from typing import Protocol

from transformers import PretrainedConfig

from eagle_core.bfloat16 import multiplies_bfloat16
from eagle_core.errors import ConfigError
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.engine.vllm_python import vllm_version
from eagle_core.target.engine.vllm_target import recompute_obstacle
from eagle_core.target.fingerprint import NORM_CONVENTION, fingerprint, fingerprint_fields
from eagle_core.target.layerwise.layer_slices import plain_layers, require_chain, require_own_layers
from eagle_core.target.layerwise.recompute_model import CURE, recomputed_layers
from eagle_core.target.model_config import (
    aux_layers,
    read_model_config,
    resolve_device,
    with_dtype,
)
from eagle_core.target.tokenizer import conversation_tokenizer
from flows.config.store import StoreConfig
from storage.objects.object_store import ObjectStore
from storage.records import keys
from storage.records.identity import OmittedStates, StoreIdentity
from storage.store import Store

logger = logging.getLogger(__name__)


class Tokenizing(Protocol):
    """Determines the tokens: a tokenizer, or an object made with one."""

    @property
    def tokenizer_fingerprint(self) -> str:
        """Fingerprint of the tokenizer."""

    @property
    def template_fingerprint(self) -> str:
        """Fingerprint of the chat template and of which answers are supervised."""


def open_store(target: TargetConfig, config: StoreConfig, root: str) -> Store:
    """Open the store at `root`; its target, tokenizer, template and profile must be these.

    Raises:
        ConfigError: there is no store.
        MismatchError: it was made with other settings; names the fields.

    """
    opened = Store.open(root)
    expected = store_identity(target, config, conversation_tokenizer(target))
    opened.identity.require_equal(expected, where=f"the store at {opened.root.url}")
    return opened


def as_in_store(target: TargetConfig, root: str, *, elsewhere: bool = False) -> TargetConfig:
    """Return a target as the store at `root` has it, where its settings leave that open.

    These are a dtype that is `auto`, and the version of vLLM. Without a store they are what is fast
    on this machine, and what is installed here.

    Args:
        target: the target.
        root: of the store, which may not be there yet.
        elsewhere: whether other machines compute states.

    Raises:
        ConfigError: there is no store, and vLLM is not installed here, or other machines would
            have to decide.

    """
    is_open = target.dtype == "auto" or (target.backend == "vllm" and not target.vllm_version)
    is_there = is_open and ObjectStore.at(root).exists(keys.IDENTITY)
    if target.dtype == "auto" and elsewhere and not is_there:
        raise ConfigError(
            f"target {target.name}: target.dtype is auto, but other machines compute the states, "
            "and what is fast there is not known here: set target.dtype to bfloat16 or float32"
        )
    return decided(target, Store.open(root).identity.target_fields if is_there else {})


def decided(target: TargetConfig, known: Mapping[str, str]) -> TargetConfig:
    """Return a target with what its settings leave open, as in the `known` fields, else as here."""
    if target.dtype == "auto":
        target = with_dtype(target, known.get("dtype"))
        why = "as its states have it" if "dtype" in known else "which is fast here"
        logger.info("target %s: dtype %s, %s", target.name, target.dtype, why)
        has_units = multiplies_bfloat16(resolve_device(target.device))
        if target.dtype == "bfloat16" and not has_units:
            logger.warning(
                "target %s: this machine has no units for bfloat16: computing states takes about "
                "100 times as long as on one that has",
                target.name,
            )
    if target.backend != "vllm":
        return target
    engine, _, version = known.get("backend", "").partition(" ")
    given = target.vllm_version or (version if engine == "vllm" else None)
    target = target.model_copy(update={"vllm_version": given})
    return target.model_copy(update={"vllm_version": vllm_version(target)})


def store_identity(target: TargetConfig, store: StoreConfig, tokens: Tokenizing) -> StoreIdentity:
    """Return the identity of the store for this target, tokenizer, template and profile."""
    folder = weights.locate(target)
    model_config = read_model_config(target, folder)
    fields = fingerprint_fields(target, folder)
    return StoreIdentity(
        target_fingerprint=fingerprint(fields),
        target_fields=fields,
        tokenizer_fingerprint=tokens.tokenizer_fingerprint,
        template_fingerprint=tokens.template_fingerprint,
        aux_layers=aux_layers(target, model_config.num_hidden_layers),
        hidden_size=model_config.hidden_size,
        vocab_size=model_config.vocab_size,
        norm_convention=NORM_CONVENTION,
        profile=store.profile,
        omitted=omitted_states(target, model_config) if store.recompute else None,
    )


def omitted_states(target: TargetConfig, model_config: PretrainedConfig) -> OmittedStates:
    """Return which states a store of this target may omit, and which layers recompute them.

    Raises:
        ConfigError: the layers of this architecture cannot be run alone, or vLLM computes states.

    """
    if target.backend == "vllm":
        raise ConfigError(recompute_obstacle(target))
    num_layers = model_config.num_hidden_layers
    early, last = recomputed_layers(aux_layers(target, num_layers), num_layers)
    require_chain(model_config, cure=CURE)
    plain = plain_layers(target, model_config)
    require_own_layers(target, model_config, plain, (early, last), cure=CURE)
    return OmittedStates(mode="one_sequence", early_layers=tuple(early), last_layers=tuple(last))
