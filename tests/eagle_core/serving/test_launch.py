"""How vLLM's server is started: to measure, and to answer."""

from pathlib import Path

import pytest

from eagle_core.serving.served import Served
from eagle_core.serving.vllm import VllmEngine
from eagle_core.target.config import TargetConfig

VLLM = VllmEngine.__new__(VllmEngine)  # it is not installed where these tests run
TARGET = TargetConfig(name="tiny", model="tiny", dtype="float32", device="cpu")


def command(served: Served) -> tuple[str, ...]:
    return VLLM.launch(served, port=1).command


def test_prompts_are_remembered_only_where_nothing_is_measured() -> None:
    measured = Served(target=TARGET, weights=Path("tiny"), max_length=64)
    answering = Served(target=TARGET, weights=Path("tiny"), max_length=64, is_measured=False)
    assert "--no-enable-prefix-caching" in command(measured)
    assert "--no-enable-prefix-caching" not in command(answering)


def test_a_template_is_handed_over_in_a_file_and_calls_have_their_parser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path))
    served = Served(
        target=TARGET,
        weights=Path("tiny"),
        max_length=64,
        chat_template="{{ messages }} \u00e4\\n",
        tool_parser="hermes",
    )
    words = command(served)
    file = Path(words[words.index("--chat-template") + 1])
    assert file.read_text(encoding="utf-8") == served.chat_template
    assert words[words.index("--tool-call-parser") + 1] == "hermes"
    assert "--enable-auto-tool-choice" in words
    plain = command(Served(target=TARGET, weights=Path("tiny"), max_length=64))
    assert not {"--chat-template", "--tool-call-parser", "--enable-auto-tool-choice"} & {*plain}
