"""Token files are named by everything that determines them."""

from transformers import AutoTokenizer

from eagle_core.data.config import DatasetConfig
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from flows.bridge.token_files import content_name
from tests.tiny import CHAT_TEMPLATE


def test_a_template_for_tools_alone_gives_another_name(target: TargetConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target.model)

    def name(**templates: str) -> str:
        tokenizer.chat_template = templates
        dataset = DatasetConfig(name="facts", source="facts.json")
        return content_name(dataset, "f", ConversationTokenizer(tokenizer))

    plain = name(default=CHAT_TEMPLATE)
    assert name(default=CHAT_TEMPLATE) == plain
    names = {plain}
    for written in ("{{ tools | length }}", "{{ tools | tojson }}"):
        names.add(name(default=CHAT_TEMPLATE, tool_use=written + CHAT_TEMPLATE))
    assert len(names) == 3
