"""What engines are told when they are measured, when they answer, and when they serve people."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from eagle_core.serving import sglang
from eagle_core.serving.served import Served
from eagle_core.serving.vllm import VllmEngine
from eagle_core.target.config import TargetConfig

TEMPLATE = "{{ messages[0]['content'] }} \u00e4\\n"
SERVED = Served(
    target=TargetConfig(name="tiny", model="tiny", dtype="float32", device="cpu"),
    weights=Path("/weights"),
    max_length=64,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep files of templates here."""
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path))


def value(words: Sequence[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_only_a_measured_server_forgets_prompts_and_ignores_the_targets_own_sampling() -> None:
    measured = VllmEngine.launch(SERVED, port=1).command
    for_people = VllmEngine.launch(replace(SERVED, is_measured=False), port=1).command
    only_measured = {"--no-enable-prefix-caching", "--generation-config", "vllm"}
    assert set(measured) - set(for_people) == only_measured


def test_address_and_template_are_handed_on() -> None:
    served = replace(SERVED, host="0.0.0.0", chat_template=TEMPLATE)  # noqa: S104 (not started)
    for words in (
        list(VllmEngine.launch(served, port=8123).command),
        sglang.command(served, port=8123),
    ):
        assert value(words, "--host") == "0.0.0.0"  # noqa: S104 (not started)
        assert value(words, "--port") == "8123"
        assert Path(value(words, "--chat-template")).read_text(encoding="utf-8") == TEMPLATE
    assert "--chat-template" not in VllmEngine.launch(SERVED, port=1).command


def test_reasoning_has_its_parser() -> None:
    words = VllmEngine.launch(replace(SERVED, reasoning_parser="qwen3"), port=1).command
    assert value(words, "--reasoning-parser") == "qwen3"
    assert "--reasoning-parser" not in VllmEngine.launch(SERVED, port=1).command


def test_calls_have_their_parser() -> None:
    words = VllmEngine.launch(replace(SERVED, tool_parser="hermes"), port=1).command
    assert value(words, "--tool-call-parser") == "hermes"
    assert "--enable-auto-tool-choice" in words
    plain = VllmEngine.launch(SERVED, port=1).command
    assert not {"--tool-call-parser", "--enable-auto-tool-choice"} & {*plain}
