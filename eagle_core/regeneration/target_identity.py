"""What of a target determines its answers, if its weights are on this machine."""

from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import for_decoding
from eagle_core.target.tokenizer import conversation_tokenizer, declared_stop_ids


def target_identity(target: TargetConfig) -> dict[str, object]:
    """Return the digests of weights, tokenizer and template, and the dtype."""
    folder = weights.locate(target)
    tokenizer = conversation_tokenizer(target)
    identity: dict[str, object] = {
        "weights": weights.weight_digests(folder),
        "dtype": for_decoding(target).dtype,
        "tokenizer": tokenizer.tokenizer_fingerprint,
        "template": tokenizer.template_fingerprint,
    }
    if tokenizer.stop_ids != declared_stop_ids(folder):  # earlier versions did not stop on others
        identity["stop_ids"] = sorted(tokenizer.stop_ids)
    return identity
