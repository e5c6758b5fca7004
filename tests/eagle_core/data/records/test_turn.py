"""Turns of the wild: roles, weights, reasoning, calls and results, parts of contents."""

import json
from collections.abc import Mapping

import pytest

from eagle_core.data.conversation import Message, Role
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.normalise import Normalised, normalise
from eagle_core.data.tool_calls import ToolCall

QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def read(*turns: Mapping[str, object], **record: object) -> Normalised:
    return normalise({"messages": list(turns), **record}, location="here")


def answer(**fields: object) -> Message:
    return read(QUESTION, {**ANSWER, **fields}).conversation.messages[-1]


def refused(*turns: Mapping[str, object]) -> Reason:
    with pytest.raises(RejectedRecord) as caught:
        read(*turns)
    return caught.value.reason


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((name, "user") for name in ("question", "instruction", "query", "Input", "prompt")),
        *((name, "assistant") for name in ("bot", "ai", "AI", "agent", "answer", "output")),
        *((name, "assistant") for name in ("response", "chatbot", "completion", "llm")),
        ("system_prompt", "system"),
    ],
)
def test_role_names_of_the_wild(name: str, role: str) -> None:
    turns = [
        {"from": name if role == known else known, "value": "x"}
        for known in ("system", "user", "assistant")
    ]
    messages = normalise({"conversations": turns}, location="x").conversation.messages
    assert [message.role for message in messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    "name", ["ipython", "environment", "tool_response", "Tool-Result", "function", "tool output"]
)
def test_names_of_tool_results(name: str) -> None:
    turns = [QUESTION, ANSWER, {"role": name, "content": "wet", "name": "sky"}, ANSWER]
    assert read(*turns).conversation.messages[2] == Message(role="tool", content="wet", name="sky")


def test_roles_of_the_recipe_come_first() -> None:
    turns = [{"from": "Pupil", "value": "q"}, {"from": "tutor", "value": "a"}]
    roles: dict[str, Role] = {"pupil": "user", "Tutor": "assistant"}
    found = normalise({"conversations": turns}, location="x", roles=roles).conversation
    assert [message.role for message in found.messages] == ["user", "assistant"]
    with pytest.raises(RejectedRecord, match=r"dataset\.roles"):
        normalise({"conversations": turns}, location="x")
    swapped: dict[str, Role] = {"human": "assistant", "gpt": "user", "function_call": "assistant"}
    turns = [{"from": "gpt", "value": "q"}, {"from": "function_call", "value": "f()"}]
    found = normalise({"conversations": turns}, location="x", roles=swapped).conversation
    assert found.messages[1] == Message(role="assistant", content="f()")


@pytest.mark.parametrize(
    "fields",
    [
        {"weight": 0}, {"weight": 0.0}, {"weight": "0"}, {"loss_mask": 0}, {"loss_mask": False},
        {"train": False}, {"train": "False"}, {"trainable": False}, {"loss": False},
        {"weight": 1, "train": False},
    ],
)  # fmt: skip
def test_an_answer_that_the_record_excludes_is_not_supervised(fields: dict[str, object]) -> None:
    assert not answer(**fields).is_supervised


@pytest.mark.parametrize(
    "fields", [{}, {"weight": None}, {"weight": 1}, {"train": True}, {"loss_mask": "1"}]
)
def test_every_other_answer_is_supervised(fields: dict[str, object]) -> None:
    assert answer(**fields) == Message(role="assistant", content="a")


@pytest.mark.parametrize(
    "fields", [{"weight": 0.5}, {"weight": 2}, {"loss_mask": [0, 1]}, {"train": "maybe"}]
)
def test_a_weight_that_cannot_be_honoured_drops_the_record(fields: dict[str, object]) -> None:
    assert refused(QUESTION, {**ANSWER, **fields}) is Reason.UNSUPPORTED_WEIGHT


def test_weights_of_turns_that_are_never_supervised() -> None:
    assert read({**QUESTION, "weight": 0}, ANSWER).unread == ()
    assert read({**QUESTION, "weight": 1}, ANSWER).unread == ("turn.weight",)
    assert read(QUESTION, {**ANSWER, "loss": 2.31}).unread == ("turn.loss",)  # a measured one


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_every_name(name: str) -> None:
    expected = Message(role="assistant", content="a", reasoning_content="hm")
    assert answer(**{name: "hm"}) == expected


@pytest.mark.parametrize(
    "thought",
    [
        {"type": "reasoning", "text": "hm"},
        {"type": "thinking", "thinking": "hm"},
        {"type": "reasoning", "reasoning": "hm"},
        {"type": "Reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
    ],
)
def test_parts_with_reasoning_are_reasoning(thought: dict[str, object]) -> None:
    parts = [thought, {"type": "output_text", "text": "a", "image_url": None}]
    expected = Message(role="assistant", content="a", reasoning_content="hm")
    assert answer(content=parts) == expected


def test_a_refusal_is_the_answer() -> None:
    assert answer(content=[{"type": "refusal", "refusal": "No."}]).content == "No."
    assert answer(content=None, refusal="No.").content == "No."


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "text": ""},
        {"type": "image_url", "image_url": {"url": "u"}, "text": "x"},
        {"image": "bytes"},
        {"type": "tool_use", "name": "sky"},
        "text without a part",
        3,
    ],
)
def test_parts_that_are_not_text_drop_the_record(part: object) -> None:
    parts = [{"type": "text", "text": "What is this?"}, part]
    assert refused({"role": "user", "content": parts}, ANSWER) is Reason.NOT_TEXT


def test_a_signature_of_reasoning_is_counted() -> None:
    part = {"type": "thinking", "thinking": "hm", "signature": "s"}
    content = [part, {"type": "text", "text": "a"}]
    assert read(QUESTION, {**ANSWER, "content": content}).unread == ("turn.content.signature",)


SKY, SEA = (ToolCall(name=name, arguments='{"at": 1}') for name in ("sky", "sea"))
CALLS = [{"name": "sky", "arguments": {"at": 1}}, {"name": "sea", "arguments": {"at": 1}}]


@pytest.mark.parametrize("name", ["function_call", "Function_Call", "tool_call", "FUNCTION-CALLS"])
@pytest.mark.parametrize("is_text", [True, False])
def test_call_turns_of_sharegpt(name: str, is_text: bool) -> None:
    for value, calls in ((CALLS[0], (SKY,)), (CALLS, (SKY, SEA))):
        turns = [
            {"from": "human", "value": "q"},
            {"from": name, "value": json.dumps(value) if is_text else value},
            {"from": "observation", "value": "wet"},
            {"from": "gpt", "value": "a"},
        ]
        messages = normalise({"conversations": turns}, location="x").conversation.messages
        assert messages[1] == Message(role="assistant", content="", tool_calls=calls)


@pytest.mark.parametrize("is_text", [True, False])
def test_openais_old_function_call_and_functions(is_text: bool) -> None:
    called = {"name": "sky", "arguments": '{"at": 1}'}
    functions = [{"name": "sky", "parameters": {}}]
    record = read(
        QUESTION,
        {
            "role": "assistant",
            "content": None,
            "function_call": json.dumps(called) if is_text else called,
        },
        {"role": "function", "name": "sky", "content": "wet"},
        ANSWER,
        functions=json.dumps(functions) if is_text else functions,
    )
    messages = record.conversation.messages
    assert messages[1] == Message(role="assistant", content="", tool_calls=(SKY,))
    assert messages[2] == Message(role="tool", content="wet", name="sky")
    assert json.loads(record.conversation.tools) == [{"type": "function", "function": functions[0]}]
    assert record.unread == ()


@pytest.mark.parametrize("is_text", [True, False])
def test_tool_calls_with_ids_and_their_results(is_text: bool) -> None:
    calls = [{"id": "c1", "type": "function", "function": CALLS[0]}]
    record = read(
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": json.dumps(calls) if is_text else calls},
        {"role": "tool", "name": "sky", "tool_call_id": "c1", "content": "wet"},
        ANSWER,
    )
    messages = record.conversation.messages
    assert messages[1].tool_calls == (ToolCall(name="sky", arguments='{"at": 1}', call_id="c1"),)
    assert (messages[2].name, messages[2].tool_call_id) == ("sky", "c1")
    assert record.unread == ()


def test_arguments_are_never_lost() -> None:
    (call,) = answer(tool_calls=[{"name": "sky", "parameters": {"at": 1}}]).tool_calls
    assert call == SKY
    strange = {"name": "sky", "arguments": {"at": 1}, "index": 7}
    assert read(QUESTION, {**ANSWER, "tool_calls": [strange]}).unread == ("turn.tool_calls.index",)


@pytest.mark.parametrize("arguments", [{"at": b"bytes"}, {"at": "\ud83d"}])
def test_arguments_that_are_no_json_drop_the_record(arguments: dict[str, object]) -> None:
    called = {**ANSWER, "tool_calls": [{"name": "sky", "arguments": arguments}]}
    assert refused(QUESTION, called) in {Reason.BAD_TOOLS, Reason.BROKEN_UTF8}


def test_calls_of_a_question_are_counted_and_not_made() -> None:
    record = read({**QUESTION, "tool_calls": CALLS, "name": "Ann"}, ANSWER)
    assert record.unread == ("turn.name", "turn.tool_calls")
    assert record.conversation.messages[0] == Message(role="user", content="q")


@pytest.mark.parametrize("name", ["arguments", "parameters", "args", "input"])
@pytest.mark.parametrize("form", ["call", "function", "beside the function", "call turn", "text"])
def test_arguments_under_every_name(name: str, form: str) -> None:
    called = {"name": "sky", name: {"at": 1}}
    turn: dict[str, object] = {"role": "assistant", "content": None}
    if form == "call":
        turn["tool_calls"] = [called]
    elif form == "function":
        turn["tool_calls"] = [{"type": "function", "function": called}]
    elif form == "beside the function":
        turn["tool_calls"] = [{"function": {"name": "sky"}, name: {"at": 1}}]
    else:
        content = json.dumps(called) if form == "text" else called
        turn = {"role": "function_call", "content": content}
    found = read(QUESTION, turn)
    assert found.conversation.messages[1].tool_calls == (SKY,)
    assert found.unread == ()


@pytest.mark.parametrize(
    "called",
    [
        {"name": "sky", "kwargs": {"at": 1}},
        {"name": "sky", "arguments": None, "params": {"at": 1}},
        {"name": "sky", "arguments": {}, "payload": "at 1"},
        {"function": {"name": "sky"}, "values": [1]},
    ],
)
def test_arguments_under_an_unknown_name_drop_the_record(called: dict[str, object]) -> None:
    for turn in (
        {**ANSWER, "tool_calls": [called]},
        {"role": "function_call", "content": json.dumps(called)},
    ):
        with pytest.raises(RejectedRecord, match=r"kwargs|params|payload|values") as caught:
            read(QUESTION, turn)
        assert caught.value.reason is Reason.BAD_TOOLS


def test_a_call_without_arguments_may_have_what_is_no_argument() -> None:
    called = {"id": "c", "type": "function", "index": 0, "function": {"name": "sky"}}
    assert answer(tool_calls=[called]).tool_calls == (
        ToolCall(name="sky", arguments="{}", call_id="c"),
    )


@pytest.mark.parametrize("value", [json.dumps(CALLS[0]), [CALLS[0]], CALLS[0]])
def test_function_calls_of_a_turn_are_calls(value: object) -> None:
    assert answer(function_calls=value).tool_calls == (SKY,)


def test_function_calls_that_are_no_json_drop_the_record() -> None:
    with pytest.raises(RejectedRecord, match="function_calls") as caught:
        read(QUESTION, {**ANSWER, "function_calls": "sky(at=1)"})
    assert caught.value.reason is Reason.BAD_TOOLS


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": "null"}, {"tool_calls": {}}, {"tool_calls": " [] "},
        {"function_call": "null"}, {"function_call": {}}, {"function_calls": "[]"},
    ],
)  # fmt: skip
def test_calls_that_hold_nothing_are_none(fields: dict[str, object]) -> None:
    assert answer(**fields) == Message(role="assistant", content="a")
    assert read(QUESTION, {**ANSWER, **fields}).unread == ()


@pytest.mark.parametrize("tools", [{}, [], "{}", "null", " "])
def test_tools_that_hold_nothing_are_none(tools: object) -> None:
    found = read(QUESTION, ANSWER, tools=tools)
    assert (found.conversation.tools, found.unread) == ("", ())


@pytest.mark.parametrize("loss", [0.0, 1.0, -0.0, 2.31])
def test_a_measured_loss_excludes_nothing(loss: float) -> None:
    found = read({**QUESTION, "loss": loss}, {**ANSWER, "loss": loss})
    assert found.conversation.messages[1].is_supervised
    assert found.unread == ("turn.loss",)


@pytest.mark.parametrize("loss", [0, False, "0", "false"])
def test_a_loss_of_zero_or_false_is_a_mask(loss: object) -> None:
    assert not answer(loss=loss).is_supervised


@pytest.mark.parametrize(
    ("name", "value"), [("weight", float("nan")), ("train", "yes"), ("trainable", 3)]
)
def test_what_is_no_weight_is_named(name: str, value: object) -> None:
    with pytest.raises(RejectedRecord, match=f"{name} is .*only 1 and 0, or true and") as caught:
        read(QUESTION, {**ANSWER, name: value})
    assert caught.value.reason is Reason.UNSUPPORTED_WEIGHT


@pytest.mark.parametrize(
    "fields", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"trainable": "false"}]
)
def test_a_record_that_excludes_itself_is_dropped(fields: dict[str, object]) -> None:
    for record in (
        {"messages": [QUESTION, ANSWER]},
        {"prompt": "q", "response": "a"},
        {"input_ids": [5, 6], "loss_mask": [0, 1]},
    ):
        with pytest.raises(RejectedRecord, match="excludes itself") as caught:
            normalise({**record, **fields}, location="here")
        assert caught.value.reason is Reason.UNSUPPORTED_WEIGHT


@pytest.mark.parametrize("fields", [{"weight": 0.5}, {"label": False}, {"loss": 0}])
def test_other_weights_and_labels_of_a_record_are_counted(fields: dict[str, object]) -> None:
    """`label` is KTO's verdict on an answer."""
    assert read(QUESTION, ANSWER, **fields).unread == tuple(fields)


@pytest.mark.parametrize("name", ["thinking", "reasoning", "reasoning_content"])
@pytest.mark.parametrize("flag", [True, False])
def test_a_flag_of_reasoning_is_none(name: str, flag: bool) -> None:
    found = read(QUESTION, {**ANSWER, name: flag})
    assert found.conversation.messages[1] == Message(role="assistant", content="a")
    assert found.unread == ()
    other = "thinking" if name == "reasoning" else "reasoning"
    assert answer(**{name: flag, other: "hm"}).reasoning_content == "hm"


@pytest.mark.parametrize("nothing", [{}, [], {"text": None}])
def test_reasoning_that_holds_nothing_is_none(nothing: object) -> None:
    assert answer(thinking=nothing) == Message(role="assistant", content="a")


@pytest.mark.parametrize("kind", ["markdown", "Markdown", "paragraph", "code"])
def test_parts_of_marked_up_text_are_text(kind: str) -> None:
    parts = [{"type": kind, "text": "a"}, {"type": "text", "text": "b"}]
    assert answer(content=parts).content == "ab"


@pytest.mark.parametrize("name", ["text", "value", "content"])
def test_text_of_a_part_under_every_name(name: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", name: "b"}]
    assert answer(content=parts).content == "ab"


@pytest.mark.parametrize("lost", [{"body": "lost"}, {"data": ["lost"]}, {"text": "", "body": "x"}])
def test_a_part_whose_text_is_not_known_drops_the_record(lost: dict[str, object]) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", **lost}]
    with pytest.raises(RejectedRecord, match=r"has no text, but '(body|data)'") as caught:
        read(QUESTION, {**ANSWER, "content": parts})
    assert caught.value.reason is Reason.NOT_TEXT
