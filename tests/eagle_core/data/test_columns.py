"""Records of columns, tool calls and reasoning become conversations."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from eagle_core.data.build import build_dataset, load_conversations
from eagle_core.data.columns import Columns
from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import Conversation, Message, content_key
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.normalise import normalise
from eagle_core.data.presets import PRESETS
from eagle_core.data.source_record import SourceRecord
from eagle_core.data.sources import read_records
from eagle_core.data.tool_calls import ToolCall
from eagle_core.errors import ConfigError, CorruptError


def turns(record: object, columns: Columns | None = None) -> list[tuple[str, str]]:
    conversation = normalise(record, location="here", columns=columns).conversation
    return [(one.role, one.content) for one in conversation.messages]


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"instruction": "q", "input": "more", "output": "a"}, "q\nmore"),
        ({"instruction": "q", "input": "", "output": "a"}, "q"),
        ({"instruction": "q", "output": "a"}, "q"),
        ({"instruction": "q", "response": "a"}, "q"),
        ({"prompt": "q", "completion": "a"}, "q"),
        ({"question": "q", "answer": "a", "id": 3}, "q"),
        ({"problem": "q", "solution": "a", "level": "5"}, "q"),
        ({"message_1": "q", "message_2": "a"}, "q"),
        ({"instruction": "q", "context": "passage", "response": "a"}, "q\npassage"),  # Dolly
        ({"instruction": "q", "context": "", "response": "a"}, "q"),
        ({"prompt": "q", "response": None, "completion": "a"}, "q"),
    ],
)
def test_usual_columns_are_recognised(record: dict[str, object], question: str) -> None:
    assert turns(record) == [("user", question), ("assistant", "a")]


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "record",
    [
        {"question": "q", "answer": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_a_system_column_leads(name: str, record: dict[str, object]) -> None:
    expected = [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert turns({name: "s", **record}) == expected
    assert turns({name: " ", **record}) == expected[1:]


def test_turns_with_a_system_turn_keep_it() -> None:
    record = {"messages": [{"role": "system", "content": "s"}, *PROMPT, *COMPLETION]}
    for column, unread in (("s\n", ()), ("other", ("system",))):
        found = normalise({"system": column, **record}, location="here")
        assert found.conversation.messages[0].content == "s"
        assert found.unread == unread


PROMPT = [{"role": "user", "content": "q"}]
COMPLETION = [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": PROMPT, "completion": COMPLETION},
        {"prompt": "q", "completion": COMPLETION},
        {"prompt": PROMPT, "completion": "a"},
        {"prompt": PROMPT, "response": COMPLETION},
    ],
)
def test_question_and_answer_as_lists_of_turns(record: dict[str, object]) -> None:
    assert turns(record) == [("user", "q"), ("assistant", "a")]
    long = {**record, "prompt": [{"role": "system", "content": "s"}, *PROMPT, *COMPLETION, *PROMPT]}
    assert [role for role, _ in turns(long)] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "history",
    [
        [["q0", "a0"]],
        [("q0", "a0")],
        '[["q0", "a0"]]',
        [{"role": "user", "content": "q0"}, {"from": "gpt", "value": "a0"}],
    ],
)
def test_a_history_comes_before_the_question(history: object) -> None:
    record = {"instruction": "q", "input": "", "output": "a", "system": "s", "history": history}
    found = normalise(record, location="here")
    assert [one.content for one in found.conversation.messages] == ["s", "q0", "a0", "q", "a"]
    assert found.unread == ()
    assert len(turns({**record, "history": []})) == 3


@pytest.mark.parametrize("history", [[["q0"]], [["q0", "a0"], "x"], [3]])
def test_a_history_of_another_form_is_counted(history: object) -> None:
    found = normalise({"prompt": "q", "response": "a", "history": history}, location="here")
    assert found.unread == ("history",)


QUESTIONS: list[dict[str, object]] = [
    {"prompt": "q"},
    {"prompt": PROMPT},
    {"instruction": "q", "input": ""},
    {"instruction": "q", "output": " "},
    {"question": "q", "answer": None, "answerKey": "B"},
    {"messages": PROMPT},
    {"instruction": None, "output": None, "prompt": "q"},
]


@pytest.mark.parametrize("record", QUESTIONS)
def test_questions_suffice_for_a_target_that_answers(record: dict[str, object]) -> None:
    found = normalise(record, location="here", questions_suffice=True).conversation
    assert [(one.role, one.content) for one in found.messages] == [("user", "q")]


@pytest.mark.parametrize("record", QUESTIONS)
def test_for_training_a_question_is_dropped(record: dict[str, object]) -> None:
    with pytest.raises(RejectedRecord) as caught:
        normalise(record, location="here")
    has_blank_answer = "output" in record or "answer" in record
    expected = {Reason.NO_ASSISTANT_TURN} | ({Reason.EMPTY_TURN} if has_blank_answer else set())
    assert caught.value.reason in expected


def test_named_columns_of_a_question_suffice_too() -> None:
    columns = Columns(question=("Problem",), answer=("Rationale",))
    record = {"Problem": "q", "prompt": "other"}
    found = normalise(record, location="here", columns=columns, questions_suffice=True)
    assert [one.content for one in found.conversation.messages] == ["q"]
    with pytest.raises(RejectedRecord, match="found Problem, prompt"):
        normalise(record, location="here", columns=columns)


def test_named_columns_win_over_turns() -> None:
    record = {"messages": [], "Problem": "q", "options": "a) b)", "Rationale": "r"}
    columns = Columns(question=("Problem", "options"), answer=("Rationale",))
    assert turns(record, columns) == [("user", "q\na) b)"), ("assistant", "r")]
    with pytest.raises(RejectedRecord) as caught:
        normalise({"Problem": "q"}, location="here", columns=columns)
    assert caught.value.reason is Reason.NO_MESSAGES


def test_an_answer_that_is_not_text_is_refused() -> None:
    with pytest.raises(RejectedRecord) as caught:
        normalise({"question": "q", "answer": {"text": ["a"]}}, location="here")
    assert caught.value.reason is Reason.NOT_TEXT


OPENAI = {
    "tools": [{"type": "function", "function": {"name": "sky"}}],
    "messages": [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "look",
            "tool_calls": [
                {"id": "c1", "function": {"name": "sky", "arguments": '{"at": "é"}'}}
            ],
        },
        {"role": "tool", "content": "wet", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Yes."},
    ],
}  # fmt: skip


def test_openai_reasoning_tools_and_calls_survive_the_disk(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(OPENAI), encoding="utf-8")
    config = DatasetConfig(name="d", source=str(tmp_path / "a.jsonl"), held_out_fraction=0)
    build_dataset(config, out_dir=tmp_path / "d")
    (conversation,) = load_conversations(tmp_path / "d", "train")
    call = ToolCall(name="sky", arguments='{"at": "é"}', call_id="c1")
    assert conversation.messages[1] == Message(
        role="assistant", content="", reasoning_content="look", tool_calls=(call,)
    )
    assert json.loads(conversation.tools) == OPENAI["tools"]
    assert call.as_openai()["function"] == {"name": "sky", "arguments": {"at": "é"}}
    assert conversation.conversation_id == content_key(conversation)


def test_sharegpt_function_calls_are_calls() -> None:
    record = {
        "tools": '[{"name": "sky"}]',
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": '{"name": "sky", "arguments": {"at": 1}}'},
            {"from": "observation", "value": "wet"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    conversation = normalise(record, location="here").conversation
    assert conversation.messages[1].tool_calls == (ToolCall(name="sky", arguments='{"at": 1}'),)
    assert conversation.tools == '[{"name": "sky"}]'


@pytest.mark.parametrize(
    "change",
    [
        {"tools": "not json"},
        {"tools": ["x"]},
        {"tool_calls": "x"},
        {"tool_calls": [3]},
        {"tool_calls": [{"function": {}}]},
    ],
)
def test_malformed_tools_are_refused(change: dict[str, object]) -> None:
    answer = {"role": "assistant", "content": "a", **change}
    record = {"messages": [{"role": "user", "content": "q"}, answer], **change}
    with pytest.raises(RejectedRecord) as caught:
        normalise(record, location="here")
    assert caught.value.reason is Reason.BAD_TOOLS


def test_what_was_thought_and_called_is_part_of_the_content() -> None:
    def key(**fields: object) -> str:
        answer = Message(role="assistant", content="a", **fields)  # type: ignore[arg-type]
        messages = (Message(role="user", content="q"), answer)
        return content_key(Conversation(conversation_id="", messages=messages))

    calls = (ToolCall(name="f", arguments="{}"),)
    keys = {key(), key(reasoning_content="r"), key(tool_calls=calls)}
    assert len(keys) == 3


@pytest.mark.parametrize("name", PRESETS)
def test_a_form_that_writes_every_field_out_gets_the_preset_too(name: str) -> None:
    written = DatasetConfig(name="m", source="data.json").model_dump(mode="json")
    form = DatasetConfig.model_validate({**written, "source": f"preset:{name}"})
    assert form == DatasetConfig(name="m", source=f"preset:{name}")


def test_presets_fill_in_and_the_user_wins() -> None:
    config = DatasetConfig(name="m", source="preset:math_qa", split="test")
    assert config.source == "hf:regisss/math_qa"
    assert config.columns == Columns(question=("Problem", "options"), answer=("Rationale",))
    assert config.split == "test"
    again = DatasetConfig.model_validate_json(config.model_dump_json())
    assert again == config
    for name in PRESETS:
        DatasetConfig(name=name, source=f"preset:{name}")
    with pytest.raises(ValidationError, match="use one of"):
        DatasetConfig(name="m", source="preset:none")


def test_question_and_answer_belong_together() -> None:
    with pytest.raises(ValidationError, match="belong together"):
        DatasetConfig(name="m", source="a.json", question=("q",))


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"one\n""two""",é\n\nq,a\n', encoding="utf-8-sig")
    config = DatasetConfig(name="d", source=str(path))
    values = [record.value for record in read_records(config) if isinstance(record, SourceRecord)]
    assert values == [
        {"question": 'one\n"two"', "answer": "é"}, {"question": "q", "answer": "a"},
    ]  # fmt: skip
    assert turns(values[0]) == [("user", 'one\n"two"'), ("assistant", "é")]


@pytest.mark.parametrize(
    "data", [b"question,answer\nq\n", b'question,answer\nq,"a', b"question,answer\nq,\xff\n"]
)
def test_damaged_csv_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(CorruptError, match=r"a\.csv"):
        list(read_records(DatasetConfig(name="d", source=str(tmp_path / "a.csv"))))


def test_rendered_text_is_kept_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    texts = [f"<|im_start|>user\n{number}<|im_end|>\n" for number in range(8)]
    records = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
    bad: list[dict[str, object]] = [{"text": 3}, {"text": " "}, {"other": "x"}, records[0]]  # type: ignore[list-item]
    path.write_text("".join(json.dumps(one) + "\n" for one in [*records, *bad]), encoding="utf-8")
    config = DatasetConfig(name="d", source=str(path), rendered_text="text", held_out_fraction=0)
    manifest = build_dataset(config, out_dir=tmp_path / "d")
    assert manifest.dropped == {"duplicate": 1, "empty_turn": 1, "no_messages": 1, "not_text": 1}
    assert [one.rendered_text for one in load_conversations(tmp_path / "d", "train")] == texts
    with pytest.raises(ValueError, match="not both"):
        DatasetConfig(name="d", source="x", rendered_text="text", question=("a",), answer=("b",))


@pytest.mark.parametrize(
    "asked",
    [
        [{"role": "user", "content": "hi"}],
        [{"from": "human", "value": "hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        [{"type": "text", "text": "hi"}],
        json.dumps([{"role": "user", "content": "hi"}]),
    ],
)
@pytest.mark.parametrize(("name", "answer"), [("input", "output"), ("context", "response")])
def test_an_instruction_leads_the_turn_beside_it(asked: object, name: str, answer: str) -> None:
    record = {"instruction": "Translate", name: asked, answer: "x"}
    assert turns(record) == [("user", "Translate\nhi"), ("assistant", "x")]


@pytest.mark.parametrize(
    "asked",
    [
        [*PROMPT, *COMPLETION],
        COMPLETION,
        [{"role": "user", "content": ""}],
        {"text": "hi"},
        True,
        [["hi"]],
    ],
)
def test_an_instruction_beside_what_it_cannot_be_joined_with_drops_the_record(
    asked: object,
) -> None:
    with pytest.raises(RejectedRecord, match="cannot be joined") as caught:
        turns({"instruction": "Translate", "input": asked, "output": "x"})
    assert caught.value.reason is Reason.NOT_TEXT


@pytest.mark.parametrize("context", [[], {}, [" "], {"a": None}, float("nan")])
def test_a_context_that_holds_nothing_is_absent(context: object) -> None:
    record = {"instruction": "q", "context": context, "response": "a"}
    assert turns(record) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("context", "text"), [(["one", "two"], "one\ntwo"), (["one"], "one"), (7, "7"), (0.5, "0.5")]
)
def test_a_context_of_texts_or_a_number(context: object, text: str) -> None:
    record = {"instruction": "q", "context": context, "response": "a"}
    assert turns(record) == [("user", f"q\n{text}"), ("assistant", "a")]


def test_several_answers_are_no_answer() -> None:
    with pytest.raises(RejectedRecord) as caught:
        turns({"question": "q", "answer": ["a", "b"]})
    assert caught.value.reason is Reason.NOT_TEXT


@pytest.mark.parametrize("answer", ["completion", "response"])
def test_question_and_answer_as_json_text_of_turns(answer: str) -> None:
    asked = [{"role": "system", "content": "s"}, *PROMPT]
    record = {"prompt": json.dumps(asked), answer: json.dumps(COMPLETION, indent=1)}
    assert turns(record) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert turns({**record, answer: "a"})[-1] == ("assistant", "a")


@pytest.mark.parametrize(
    "answer", ['[{"name": "f"}]', '{"role": "assistant"}', json.dumps(PROMPT), "[role]", "[]"]
)
def test_other_json_is_the_text_of_an_answer(answer: str) -> None:
    assert turns({"prompt": "q", "completion": answer})[1] == ("assistant", answer)


def test_question_and_response() -> None:
    assert turns({"question": "q", "response": "a"}) == [("user", "q"), ("assistant", "a")]
    assert turns({"question": "q", "answer": "b", "response": "a"})[1] == ("assistant", "b")
    assert turns({"question": "q", "answer": None, "response": "a"})[1] == ("assistant", "a")


@pytest.mark.parametrize(
    ("asked", "answered"),
    [("input", "output"), ("question", "answer"), ("prompt", "response")],
)
def test_pairs_of_question_and_answer_are_turns(asked: str, answered: str) -> None:
    """As in Capybara."""
    pairs = [{asked: "q1", answered: "a1", "rank": 3}, {asked: "q2", answered: "a2"}]
    found = normalise({"conversation": pairs, "source": "web"}, location="here")
    assert [(one.role, one.content) for one in found.conversation.messages] == [
        ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"),
    ]  # fmt: skip
    assert found.unread == ("source", "turn.rank")


def test_a_pair_without_an_answer_is_no_turn() -> None:
    with pytest.raises(RejectedRecord) as caught:
        turns({"conversation": [{"input": "q", "output": None}]})
    assert caught.value.reason is Reason.UNKNOWN_ROLE


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [], "messages": [*PROMPT, *COMPLETION]},
        {"conversations": [{"from": None, "value": None}], "messages": [*PROMPT, *COMPLETION]},
        {"conversation": "[]", "messages": [*PROMPT, *COMPLETION]},
        {"messages": [], "prompt": "q", "response": "a"},
        {"messages": [{"role": "system", "content": " "}, *PROMPT, *COMPLETION]},
        {"messages": [{"role": "system", "content": None}, *PROMPT, *COMPLETION], "system": ""},
    ],
)
def test_turns_that_hold_nothing_are_ignored(record: dict[str, object]) -> None:
    found = normalise(record, location="here")
    assert [one.content for one in found.conversation.messages] == ["q", "a"]
    assert found.unread == ()


def test_an_empty_system_turn_leaves_its_place_to_the_column() -> None:
    record = {"messages": [{"role": "system", "content": ""}, *PROMPT, *COMPLETION], "system": "s"}
    assert turns(record)[0] == ("system", "s")
    with pytest.raises(RejectedRecord) as caught:
        turns({"messages": [{"role": "system", "content": ""}]})
    assert caught.value.reason is Reason.NO_ASSISTANT_TURN


@pytest.mark.parametrize(
    ("record", "columns", "named"),
    [
        ({"Frage": "q"}, None, r"neither turns nor question; found Frage; .*`dataset\.question`"),
        ({"messages": [], "x": 1}, None, r"messages is empty; found messages, x; .*`dataset\."),
        (
            {"Frage": "q"},
            Columns(question=("Frage",), answer=("A", "B")),
            "no column A, B .*answer",
        ),
        ({"A": "a"}, Columns(question=("Frage",), answer=("A",)), "no column Frage .*question"),
    ],
)
def test_what_is_missing_is_named(
    record: dict[str, object], columns: Columns | None, named: str
) -> None:
    with pytest.raises(RejectedRecord, match=named) as caught:
        turns(record, columns)
    assert caught.value.reason is Reason.NO_MESSAGES


def test_a_data_set_without_known_columns_says_which_key_helps(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"Frage": "q", "Antwort": "a"}\n')
    config = DatasetConfig(name="d", source=str(tmp_path / "a.jsonl"))
    with pytest.raises(ConfigError, match=r"name the columns with `question`.*`rendered_text`"):
        build_dataset(config, out_dir=tmp_path / "d")
