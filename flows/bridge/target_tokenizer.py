"""The tokenizer of a target, for the flows and the training processes."""

from transformers import AutoTokenizer

from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer


def conversation_tokenizer(target: TargetConfig) -> ConversationTokenizer:
    """Return the target's own tokenizer, with its own chat template or the configured one."""
    folder = weights.locate(target)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=target.trust_remote_code)
    return ConversationTokenizer(tokenizer, target.template)
