"""Answers of real engines, whose servers the flow starts: they are those of the target run here.

make test-engine
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import psutil
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from eagle_core.data.build import load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import Conversation, Message
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.serving.served import EngineName
from eagle_core.target.config import TargetConfig
from eagle_core.tokenization.config import TemplateConfig
from flows.regenerate import RegenerateSummary, regenerate_flow
from tests.flows.test_engines import PYTHON
from tests.served_target import write_served_target
from tests.tiny import CHAT_TEMPLATE, TOPICS
from tests.waiting import wait_for

NUM_WORDS = 39
LAST_WORD = " h"
"""Where the target would write it, an answer ends: some do, and some go on until they are cut."""
GREEDY = RegenerationConfig(max_tokens=48, concurrency=3)
PENALISED = RegenerationConfig(
    max_tokens=96, concurrency=2, cut_answers="keep", repetition_penalty=1.1
)
ENGINES = pytest.mark.parametrize("engine", ["llamacpp", "vllm"])

pytestmark = [
    pytest.mark.engines,
    pytest.mark.slow,
    pytest.mark.server,
    pytest.mark.usefixtures("prefect_server"),
    pytest.mark.skipif(PYTHON is None, reason="needs vLLM; see CONTRIBUTING.md: make test-engine"),
]

Answers = Callable[..., tuple[RegenerateSummary, dict[str, tuple[Message, ...]]]]
"""From settings, and a template, to what the flow made of the questions."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetConfig:
    """A target that writes plain words only: engines replace the bytes of half characters."""
    folder = write_served_target(tmp_path_factory.mktemp("words") / "target")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    texts = [tokenizer.decode([number]) for number in range(len(tokenizer))]
    words = [one for one, text in enumerate(texts) if text[0] == " " and text[1:].isalpha()]
    said = [one for one in words if texts[one].isascii()][:NUM_WORDS]
    ended = next(one for one in said if texts[one] == LAST_WORD)
    others = torch.ones(len(tokenizer), dtype=torch.bool)
    others[[tokenizer.eos_token_id, *said]] = False
    others[ended] = True
    with torch.no_grad():
        head = model.lm_head.weight
        head[tokenizer.eos_token_id] = head[ended]
        head[others] = 0
    model.save_pretrained(folder)
    return TargetConfig(
        name="words", model=str(folder), dtype="float32", device="cpu", vllm_python=str(PYTHON)
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetConfig:
    """Bare prompts, and conversations that end with the user."""
    records: list[dict[str, object]] = [
        {"id": f"bare {number}", "prompt": f"What is fact {number} about {topic}?"}
        for number, topic in enumerate(TOPICS * 2)
    ]
    for number, topic in enumerate(TOPICS):
        turns = (("user", f"Do you know {topic}?"), ("assistant", "Yes."), ("user", "Tell me."))
        messages = [{"role": role, "content": text} for role, text in turns]
        records.append({"id": f"open {number}", "messages": messages})
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return DatasetConfig(name="questions", source=str(path), held_out_fraction=0.2)


@pytest.fixture(scope="module")
def answers(
    target: TargetConfig,
    dataset: DatasetConfig,
    tmp_path_factory: pytest.TempPathFactory,
    prefect_server: str,
) -> Answers:
    """Run the flow, each time in another folder unless one is given."""
    assert prefect_server

    def regenerated(
        config: RegenerationConfig,
        *,
        template: TemplateConfig | None = None,
        home: Path | None = None,
    ) -> tuple[RegenerateSummary, dict[str, tuple[Message, ...]]]:
        chosen = target.model_copy(update={"template": template or target.template})
        home = home or tmp_path_factory.mktemp("home")
        summary = regenerate_flow(chosen, dataset, config, home=str(home))
        return summary, {one.conversation_id: one.messages for one in in_both_splits(summary.path)}

    return regenerated


def in_both_splits(folder: Path) -> Iterator[Conversation]:
    for split in ("train", "held_out"):
        yield from load_conversations(folder, split)


def by(engine: EngineName, config: RegenerationConfig) -> RegenerationConfig:
    """Return the settings with an engine."""
    return RegenerationConfig.model_validate(config.model_dump() | {"engine": engine})


@ENGINES
def test_bare_prompts_get_the_answers_of_the_target_itself(
    answers: Answers, engine: EngineName, caplog: pytest.LogCaptureFixture
) -> None:
    expected, texts = answers(GREEDY)
    summary, found = answers(by(engine, GREEDY))
    assert found == texts
    assert len({messages[1].content for messages in texts.values()}) > len(texts) // 2
    assert (summary.dropped, summary.changed) == (expected.dropped, expected.changed)
    assert 0 < summary.dropped["answer_cut"] < 20
    assert summary.num_asked == 24
    assert "another prompt" not in caplog.text


@ENGINES
def test_sampling_is_limited_and_renders_the_configured_template(
    answers: Answers, engine: EngineName, caplog: pytest.LogCaptureFixture
) -> None:
    """With one token to choose from, every answer is the greedy one."""
    template = TemplateConfig(chat_template=CHAT_TEMPLATE)
    expected, texts = answers(GREEDY, template=template)
    sampled = GREEDY.model_copy(update={"temperature": 0.9, "top_k": 1, "num_answers": 2})
    summary, found = answers(by(engine, sampled), template=template)
    assert found == texts
    assert summary.num_asked == 2 * 24
    assert summary.dropped["duplicate"] == len(texts)
    assert summary.dropped["answer_cut"] == 2 * expected.dropped["answer_cut"]
    assert "another prompt" not in caplog.text


@ENGINES
def test_a_server_that_is_killed_is_started_again_and_no_answer_asked_for_twice(
    answers: Answers, engine: EngineName, tmp_path: Path
) -> None:
    _, texts = answers(PENALISED)
    with killing_the_server(tmp_path, after=4) as num_kept:
        summary, found = answers(by(engine, PENALISED), home=tmp_path)
    assert found == texts
    assert {len(messages) for messages in found.values()} == {2, 4}
    assert 4 <= num_kept[0] < 24
    assert 0 < summary.num_asked <= 24 - num_kept[0]
    keys = [json.loads(line.partition(" ")[2])["key"] for line in journal_lines(tmp_path)]
    assert len(keys) == len(set(keys)) == 24
    assert not servers()


@contextmanager
def killing_the_server(home: Path, *, after: int) -> Iterator[list[int]]:
    """Kill the server of the flow in the block; yield where the number of answers then is put."""
    num_kept: list[int] = []

    def kill() -> None:
        wait_for(lambda: len(journal_lines(home)) >= after, what="answers", every_seconds=0.002)
        (server,) = servers()
        os.kill(server.pid, signal.SIGKILL)
        num_kept.append(len(journal_lines(home)))

    thread = Thread(target=kill)
    thread.start()
    yield num_kept
    thread.join()


def journal_lines(home: Path) -> list[str]:
    """Return the whole lines of the journal of answers."""
    found = [path.read_text(encoding="utf-8") for path in home.rglob("answers-*.jsonl")]
    return [line for text in found for line in text.splitlines(keepends=True) if line[-1] == "\n"]


def servers() -> list[psutil.Process]:
    """Return the servers that guards among this process's children run."""
    guards = [one for one in psutil.Process().children() if "guard.py" in " ".join(one.cmdline())]
    return [server for guard in guards for server in guard.children()]
