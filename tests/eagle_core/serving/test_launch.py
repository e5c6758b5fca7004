"""What engines are told when they are measured, and when they serve people."""

from dataclasses import replace
from pathlib import Path

from eagle_core.serving import sglang
from eagle_core.serving.served import Served
from eagle_core.serving.vllm import VllmEngine
from eagle_core.target.config import TargetConfig

TEMPLATE = "{{ messages[0]['content'] }}"
SERVED = Served(
    target=TargetConfig(name="tiny", model="tiny", dtype="float32", device="cpu"),
    weights=Path("/weights"),
    max_length=64,
)


def test_only_a_measured_server_forgets_prompts_and_ignores_the_targets_own_sampling() -> None:
    measured = VllmEngine.launch(SERVED, port=1).command
    for_people = VllmEngine.launch(replace(SERVED, is_measured=False), port=1).command
    only_measured = {"--no-enable-prefix-caching", "--generation-config", "vllm"}
    assert set(measured) - set(for_people) == only_measured


def test_address_and_template_are_handed_on() -> None:
    served = replace(SERVED, host="0.0.0.0", chat_template=TEMPLATE)  # noqa: S104 (not started)
    for command in (
        VllmEngine.launch(served, port=8123).command,
        sglang.command(served, port=8123),
    ):
        words = list(command)
        options = {
            name: words[words.index(name) + 1]
            for name in words
            if name.startswith("--") and words.index(name) + 1 < len(words)
        }
        assert options["--host"] == "0.0.0.0"  # noqa: S104 (not started)
        assert options["--port"] == "8123"
        assert options["--chat-template"] == TEMPLATE
    assert "--chat-template" not in VllmEngine.launch(SERVED, port=1).command
