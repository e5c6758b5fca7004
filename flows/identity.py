"""What a store's states are made with, as `storage` wants to know it."""

from eagle_core import weights
from eagle_core.target import (
    NORM_CONVENTION,
    aux_layers,
    fingerprint,
    fingerprint_fields,
    read_model_config,
)
from eagle_core.target_config import TargetConfig
from flows.config import StoreConfig
from flows.summaries import TokensSummary
from storage.identity import StoreIdentity


def store_identity(
    target: TargetConfig, store: StoreConfig, tokens: TokensSummary
) -> StoreIdentity:
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
    )
