"""Settings of regeneration that contradict each other, and what they mean for earlier answers."""

import pytest

from eagle_core.regeneration.config import RegenerationConfig

FORMER_IDENTITY = {
    "max_tokens": 2048,
    "cut_answers": "drop",
    "temperature": 0.0,
    "thinking": None,
    "seed": None,
}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "vllm", "base_url": "http://127.0.0.1:8000/v1"}, "base_url is for a server"),
        ({"engine": "vllm", "model": "m"}, "model is for a server that runs already"),
        ({"engine": "llamacpp", "credentials": "key"}, "credentials is for a server"),
        ({"context_tokens": 512}, "context_tokens is for an engine's server: set engine"),
        ({"tool_parser": "hermes"}, "tool_parser is for an engine's server: set engine"),
        ({"engine": "llamacpp", "tool_parser": "hermes"}, "tool_parser is vLLM's"),
        ({"engine": "llamacpp", "reasoning_parser": "qwen3"}, "reasoning_parser is vLLM's"),
        ({"reasoning_parser": "qwen3"}, "reasoning_parser is for an engine's server: set engine"),
        ({"top_p": 0.9}, "top_p limits sampling, but temperature is 0"),
        ({"top_k": 40}, "top_k limits sampling, but temperature is 0"),
        ({"num_answers": 2}, "num_answers is 2, but at temperature 0"),
        ({"engine": "sglang"}, "'vllm' or 'llamacpp'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        RegenerationConfig.model_validate(settings)


def test_new_settings_leave_the_identity_of_earlier_answers() -> None:
    config = RegenerationConfig()
    assert (config.identity(), config.scope()) == (FORMER_IDENTITY, {})
    engine = RegenerationConfig(engine="vllm", concurrency=4)
    assert engine.identity() == FORMER_IDENTITY


def test_what_changes_an_answer_is_in_its_identity_and_how_many_there_are_is_not() -> None:
    config = RegenerationConfig(
        engine="llamacpp",
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        repetition_penalty=1.1,
        num_answers=3,
        context_tokens=4096,
    )
    changed = {"temperature": 0.7, "seed": 0, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}
    assert config.identity() == FORMER_IDENTITY | changed
    assert config.scope() == {"num_answers": 3, "context_tokens": 4096}
