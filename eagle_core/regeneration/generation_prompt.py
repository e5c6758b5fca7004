"""Whether the target's template opens the reasoning before the answer begins.

The opening tag is then in the prompt, and an answer that was cut inside its reasoning has no tag.
"""

from pathlib import Path

from transformers import AutoTokenizer

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import RejectedRecord
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer


def opens_reasoning(tokenizer: ConversationTokenizer, *, thinking: bool | None) -> bool:
    """Return whether the text before an answer ends with the opening tag."""
    question = Message(role="user", content="a")
    try:
        prompt = tokenizer.prompt([question], thinking=thinking)
    except RejectedRecord:
        return False
    return tokenizer.decode(prompt).rstrip().endswith("<think>")


def served_target_opens_reasoning(target: TargetConfig, *, thinking: bool | None) -> bool:
    """Return the same of a target on a server; False if its tokenizer is not on this machine."""
    folder = Path(target.model).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder if folder.is_dir() else target.model,
            revision=target.revision,
            trust_remote_code=target.trust_remote_code,
            local_files_only=True,
        )
        return opens_reasoning(ConversationTokenizer(tokenizer, target.template), thinking=thinking)
    except Exception:  # noqa: BLE001 (not here, or not usable: the target runs elsewhere)
        return False
