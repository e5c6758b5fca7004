"""The flow `regenerate`, and what comes after it on the data set that it makes."""

from pathlib import Path

import pytest
from prefect import flow
from prefect.blocks.system import Secret

from eagle_core.data.build import load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.data.manifest import load_manifest
from eagle_core.errors import ConfigError, TransientError
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.target.config import TargetConfig
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.config import TemplateConfig
from eagle_core.tokenization.token_file import TokenFile
from flows.config.store import StoreConfig
from flows.hidden_states import hidden_states
from flows.regenerate import answer_all, answer_source, regenerate_flow, summary_rows
from flows.tasks.prepare import prepare_dataset
from flows.tasks.tokenize import tokenize
from flows.workspace import Workspace
from tests.eagle_core.regeneration.answer_server import Body, say, serving
from tests.tiny import CHAT_TEMPLATE

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]

SETTINGS = RegenerationConfig(max_tokens=6, cut_answers="keep")


def test_the_target_answers_and_its_answers_become_hidden_states(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, store: StoreConfig
) -> None:
    home = str(tmp_path)
    few = dataset.model_copy(update={"max_conversations": 12})
    summary = regenerate_flow(target, few, SETTINGS, home=home)
    path = tmp_path / "datasets" / "facts-by-tiny"
    assert summary.path == path
    assert summary.num_asked == summary.num_conversations == 12
    assert summary.num_train + summary.num_held_out + sum(summary.dropped.values()) == 12
    assert summary.num_train >= 5
    row = dict(summary_rows(summary))["train on it"]
    assert "--set dataset.name=facts-by-tiny --set dataset.source=regenerated" in row
    again = regenerate_flow(target, few, SETTINGS, home=home)
    assert (again.num_asked, again.fingerprint) == (0, summary.fingerprint)
    more = regenerate_flow(
        target, dataset.model_copy(update={"max_conversations": 15}), SETTINGS, home=home
    )
    assert (more.num_asked, more.num_conversations) == (3, 15)

    answers = DatasetConfig(name="facts-by-tiny", source="regenerated", max_length=256)
    states = hidden_states(target, answers, store, home=home)
    assert states.num_samples == more.num_train + more.num_held_out
    old = {
        message.content
        for conversation in load_conversations(tmp_path / "datasets" / "facts", "train")
        for message in conversation.messages
        if message.role == "assistant"
    }
    tokenizer = conversation_tokenizer(target)
    (file,) = (tmp_path / "tokens" / "tiny-facts-by-tiny").glob("train-*.arrow")
    for sample in TokenFile(file):
        assert not any(text in tokenizer.decode(sample.input_ids) for text in old)


def test_a_server_gets_the_key_of_a_prefect_block(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    Secret(value="from-the-block").save("answers-key")
    monkeypatch.setenv("MY_KEY", "from-the-variable")
    with serving() as server:
        config = RegenerationConfig(
            base_url=server.url, name="answers", model="served", api_key_variable="MY_KEY"
        )
        summary = regenerate_flow(target, dataset, config, home=str(tmp_path))
        assert set(server.keys) == {"Bearer from-the-variable"}
        block = config.model_copy(update={"name": "more", "credentials": "answers-key"})
        regenerate_flow(target, dataset, block, home=str(tmp_path))
        assert set(server.keys) == {"Bearer from-the-variable", "Bearer from-the-block"}
    assert summary.num_asked == 40
    assert {body["model"] for body in server.requests} == {"served"}
    manifest = load_manifest(tmp_path / "datasets" / "answers")
    assert manifest.config["regeneration"]["target"] == {"served_model": "served"}
    with pytest.raises(ConfigError, match="no Prefect block secret/nobodys"):
        answer_source(target, config.model_copy(update={"credentials": "nobodys"}))


def test_the_recipe_decides_what_is_learned_from_and_processes_change_nothing(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    space = Workspace(home=tmp_path, target="tiny", dataset="facts")
    prepare_dataset(dataset, space)
    every = tokenize(target, dataset, space)
    two = dataset.model_copy(update={"tokenize_processes": 2})
    apart = Workspace(home=tmp_path / "apart", target="tiny", dataset="facts")
    prepare_dataset(two, apart)
    assert tokenize(target, two, apart).train_path.name == every.train_path.name
    assert (
        TokenFile(tokenize(target, two, apart).train_path).sample_ids
        == TokenFile(every.train_path).sample_ids
    )
    last = target.model_copy(update={"template": TemplateConfig(last_turn_only=True)})
    fewer = tokenize(last, dataset, space)
    assert fewer.num_supervised_tokens < every.num_supervised_tokens
    assert fewer.train_path != every.train_path
    assert fewer.template_fingerprint != every.template_fingerprint


def test_the_terminal_says_what_became_of_the_questions(
    tmp_path: Path,
    target: TargetConfig,
    dataset: DatasetConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fault(_times: int, body: Body) -> tuple[int, str] | None:
        is_refused = "about rivers" in body["messages"][0]["content"]
        return (400, '{"error": {"message": "no rivers here"}}') if is_refused else None

    with serving(fault=fault) as server:
        config = RegenerationConfig(base_url=server.url, name="answers")
        summary = regenerate_flow(target, dataset, config, home=str(tmp_path))
        printed = capsys.readouterr().out
    num_refused = summary.dropped["request_refused"]
    assert num_refused >= 5
    assert (summary.num_asked, summary.num_answered) == (40, 40 - num_refused)
    assert summary.ledger_path.is_file()
    rows = dict(summary_rows(summary))
    assert (rows["asked in this run"], rows["kept"]) == ("40", str(40 - num_refused))
    assert (rows["dropped"], rows["answered in this run"]) == (
        str(num_refused),
        str(40 - num_refused),
    )
    for text in ("asked in this run", "dropped: request_refused", "400: no rivers here"):
        assert text in printed
    assert str(summary.ledger_path) in printed.replace("\n", "")


def test_a_server_that_refuses_every_question_fails_the_flow_with_its_words(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    said = (400, '{"error": {"message": "chat_template_kwargs is not supported"}}')
    with serving(fault=lambda _times, _body: said) as server:
        config = RegenerationConfig(base_url=server.url, thinking=False, concurrency=2)
        with pytest.raises(
            ConfigError, match=r"400: chat_template_kwargs .*regeneration\.thinking"
        ):
            regenerate_flow(target, dataset, config, home=str(tmp_path))
        assert server.asked.total() <= 7


def test_a_pause_before_the_next_attempt_is_announced(
    tmp_path: Path,
    target: TargetConfig,
    dataset: DatasetConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    space = Workspace(home=tmp_path, target="tiny", dataset="facts")
    answers = Workspace(home=tmp_path, target="tiny", dataset="answers")
    once = answer_all.with_options(retries=0)
    with serving(fault=lambda _times, _body: "502") as server:
        config = RegenerationConfig(base_url=server.url, attempts=1, concurrency=2)

        @flow(persist_result=False)
        def ask_once() -> None:
            once(target, config, prepare_dataset(dataset, space), answers)

        with pytest.raises(TransientError, match="failed 20 conversations in a row"):
            ask_once()
    assert "fault 502 (attempt 1); check its log" in caplog.text
    assert "the next attempt is in 30 seconds" in caplog.text


def test_a_cut_inside_reasoning_that_the_template_opened_is_not_kept(
    tmp_path: Path, target: TargetConfig, dataset: DatasetConfig
) -> None:
    opening = CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    template = TemplateConfig(chat_template=opening)
    with serving(lambda _body: say("Let me see", finish_reason="length")) as server:
        config = RegenerationConfig(base_url=server.url, cut_answers="keep", concurrency=4)
        with pytest.raises(ConfigError, match=r"'answer_cut': 40.*inside the reasoning"):
            regenerate_flow(
                target.model_copy(update={"template": template}),
                dataset,
                config,
                home=str(tmp_path),
            )
