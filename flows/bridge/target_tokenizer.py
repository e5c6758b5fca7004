"""The tokenizer of a target, as the flows and the processes that train need it."""

from transformers import AutoTokenizer

from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer


def conversation_tokenizer(target: TargetConfig) -> ConversationTokenizer:
    """Return the target's own tokenizer, with its chat template or the one that was chosen."""
    folder = weights.locate(target)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=target.trust_remote_code)
    return ConversationTokenizer(tokenizer, target.template)
