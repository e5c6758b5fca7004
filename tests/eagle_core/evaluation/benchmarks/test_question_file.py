"""Records of the named sets become questions; what is none is named."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eagle_core.errors import ConfigError, CorruptError
from eagle_core.evaluation.benchmarks.config import KNOWN, BenchmarkConfig
from eagle_core.evaluation.benchmarks.question import Question, spread_over_categories
from eagle_core.evaluation.benchmarks.question_file import QuestionFile
from eagle_core.evaluation.benchmarks.sets import BENCHMARKS
from tests.eagle_core.evaluation.benchmarks.files import RECORDS, as_parquet, write_sets
from tests.hub import COMMIT, Hub, Repository, serve_hub
from tests.waiting import LIMIT_SECONDS


def read(name: str, path: Path) -> list[Question]:
    return list(QuestionFile.find(BenchmarkConfig(name=name, path=str(path))).questions())


def turns(question: Question) -> list[str]:
    return [question.messages[-1].content, *question.later_turns]


def test_every_named_set_is_pinned_and_has_a_form() -> None:
    assert set(KNOWN) == set(BENCHMARKS) == set(RECORDS)
    assert all(len(one.revision) == 40 for one in BENCHMARKS.values())


def test_records_of_every_set_become_what_is_asked(tmp_path: Path) -> None:
    paths = write_sets(tmp_path)
    asked = {name: [turns(one) for one in read(name, path)] for name, path in paths.items()}
    assert asked["mt-bench"][2] == ["Add two and two.", "And two more?"]
    (code,) = asked["humaneval"][0]
    assert code.startswith("Complete the following Python function.\n\n```python\ndef twice(")
    assert code.endswith('two times n."""\n```')
    assert asked["gsm8k"][1] == ["Bread costs 2. What do five loaves cost?"]
    assert asked["math-500"] == [["Solve $x + 1 = 3$."]]
    assert asked["alpaca"] == [["Name three tides."], ["Translate.\n\nBrot"]]
    assert asked["cnn-dailymail"] == [
        ["Summarize the following article.\n\nThe tide rose. The town slept."]
    ]
    assert asked["speed-bench"] == [
        ["Sort a list."],
        ["You are a falcon.", "What do you eat?", "And in winter?"],
    ]


def test_what_a_set_has_no_text_for_is_counted(tmp_path: Path) -> None:
    path = write_sets(tmp_path)["speed-bench"]
    file = QuestionFile.find(BenchmarkConfig(name="speed-bench", path=str(path)))
    assert [question.category for question in file.questions()] == ["coding", "roleplay"]
    assert file.num_without_text == 1
    assert "xxh3_128:" in file.source


def test_the_form_of_fastchats_own_file_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps({"category": "math", "turns": ["One?", "Two?"]}) + "\n")
    (question,) = read("mt-bench", path)
    assert turns(question) == ["One?", "Two?"]


def test_a_file_of_ones_own_may_be_a_prompt_file_with_turns(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    records = [{"turns": ["One?", "Two?"], "category": "count"}, {"question": "Three?"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    first, second = read("own", path)
    assert (turns(first), first.category) == (["One?", "Two?"], "count")
    assert turns(second) == ["Three?"]
    path.write_text('{"answer": "Four."}\n')
    with pytest.raises(ConfigError, match=r"own\.jsonl.* is not a question"):
        read("own", path)


@pytest.mark.parametrize(
    ("name", "record", "why"),
    [
        ("gsm8k", {"problem": "Two?"}, r"`question`; it has problem"),
        ("humaneval", {"prompt": "  "}, r"`prompt`"),
        ("mt-bench", {"prompt": "One?"}, r"list of texts in `prompt` or `turns`"),
        ("speed-bench", {"turns": []}, r"list of texts in `turns`"),
        ("speed-bench", {"turns": ["One?", None]}, r"list of texts in `turns`"),
    ],
)
def test_a_record_of_another_form_is_named(
    tmp_path: Path, name: str, record: dict[str, object], why: str
) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(ConfigError, match=rf"set\.jsonl.*no question of benchmark {name}.*{why}"):
        read(name, path)


def test_an_unknown_name_needs_a_file() -> None:
    with pytest.raises(ValueError, match=r"no benchmark mtbench.*`path`.*mt-bench"):
        BenchmarkConfig(name="mtbench")
    with pytest.raises(ValueError, match="`revision` is of the hub"):
        BenchmarkConfig(name="gsm8k", path="own.jsonl", revision="main")


def test_few_questions_are_of_all_categories() -> None:
    questions = [Question(messages=(), category=name) for name in "aaaabbc"]

    def chosen(count: int) -> str:
        return "".join(one.category for one in spread_over_categories(questions, count))

    assert chosen(3) == "abc"
    assert chosen(5) == "aabbc"
    assert chosen(6) == "aaabbc"
    assert chosen(9) == "aaaabbc"


FIND = """
import sys
from eagle_core.evaluation.benchmarks.config import BenchmarkConfig
from eagle_core.evaluation.benchmarks.question_file import QuestionFile
try:
    file = QuestionFile.find(BenchmarkConfig.model_validate_json(sys.argv[1]))
    print(file.source, [one.messages[-1].content for one in file.questions()])
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    gsm8k = BENCHMARKS["gsm8k"]
    files = {gsm8k.file: as_parquet(RECORDS["gsm8k"])}
    repositories = {
        gsm8k.repository: Repository(files=files),
        BENCHMARKS["alpaca"].repository: Repository(files=files),
    }
    with serve_hub(repositories) as served:
        yield served


def find(hub: Hub, home: Path, *, offline: bool = False, **fields: str) -> str:
    """Find a file in another process: the hub's address is read when its client is imported."""
    done = subprocess.run(
        [sys.executable, "-c", FIND, json.dumps(fields)],
        env={
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_OFFLINE": str(int(offline)),
            "NO_PROXY": "127.0.0.1",
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=LIMIT_SECONDS,
    )
    return done.stdout.strip()


@pytest.mark.slow
def test_a_named_set_is_downloaded_once_at_a_commit(hub: Hub, tmp_path: Path) -> None:
    known = BENCHMARKS["gsm8k"]
    missing = find(hub, tmp_path, offline=True, name="gsm8k")
    assert missing.startswith(f"ConfigError benchmark gsm8k: {known.file} of openai/gsm8k@740312ad")
    assert "evaluation.benchmarks=[{name: gsm8k, path: FILE}]" in missing
    first = find(hub, tmp_path, name="gsm8k", revision="main")
    assert first.startswith(f"hf://datasets/{known.repository}@{COMMIT}/{known.file} ['Ann has")
    assert find(hub, tmp_path, offline=True, name="gsm8k", revision=COMMIT) == first
    absent = find(hub, tmp_path, name="alpaca", revision=COMMIT)
    assert absent.startswith("ConfigError benchmark alpaca: data/train-00000")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"question": "Two?"}\n{"question": \n', "broken_json"),
        ('{"question": "Two?"}\n{"question": "Th', "truncated"),
        ("question\nTwo?\n", "broken_json"),
        ('[{"question": "Two?"}, {"question": "\udcff"}]', "broken_utf8"),
    ],
)
def test_a_damaged_file_is_named_without_settings_that_benchmarks_lack(
    tmp_path: Path, text: str, why: str
) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(CorruptError, match=rf"set\.jsonl.*gsm8k.*{why}.*replace") as caught:
        read("gsm8k", path)
    assert "accept_" not in str(caught.value)
    assert "dataset.format" not in str(caught.value)
