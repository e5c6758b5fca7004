"""Records that are token ids already."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from eagle_core.data.build import build_dataset, load_conversations
from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import Conversation, Message, TokenRow
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.data.normalise import normalise
from eagle_core.data.splits import question_key

IDS, MASK = [5, 6, 7, 8], [0, 0, 1, 1]
ROW = TokenRow(input_ids=(5, 6, 7, 8), loss_mask=(False, False, True, True))


@pytest.mark.parametrize(
    "record",
    [
        {"input_ids": IDS, "loss_mask": MASK},
        {"input_ids": IDS, "loss_mask": [False, False, True, True]},
        {"input_ids": IDS, "loss_mask": [0.0, 0.0, 1.0, 1.0]},
        {"input_ids": [IDS], "loss_mask": [MASK]},
        {"input_ids": json.dumps(IDS), "loss_mask": json.dumps(MASK)},
        {"input_ids": IDS, "assistant_masks": MASK},
        {"input_ids": IDS, "labels": [-100, -100, 7, 8]},
        {"input_ids": IDS, "loss_mask": MASK, "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [*IDS, 0], "loss_mask": [*MASK, 0], "attention_mask": [1, 1, 1, 1, 0]},
        {
            "input_ids": [0, *IDS],
            "labels": [-100, -100, -100, 7, 8],
            "attention_mask": [0, 1, 1, 1, 1],
        },
        {"input_ids": IDS, "loss_mask": MASK, "messages": None},
    ],
)
def test_ids_and_mask_are_read(record: dict[str, object]) -> None:
    found = normalise(record, location="here")
    assert found.conversation.tokens == ROW
    assert found.conversation.messages == ()
    assert found.unread == ()


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ({"input_ids": IDS}, Reason.BAD_TOKENS, "without any of loss_mask"),
        ({"input_ids": IDS, "loss_mask": MASK[:3]}, Reason.BAD_TOKENS, "3 entries, input_ids 4"),
        ({"input_ids": IDS, "loss_mask": [0, 0, 2, 1]}, Reason.BAD_TOKENS, "has 2, not 0 or 1"),
        ({"input_ids": [5, -6, 7, 8], "loss_mask": MASK}, Reason.BAD_TOKENS, "has -6"),
        ({"input_ids": [5, 2**31, 7, 8], "loss_mask": MASK}, Reason.BAD_TOKENS, "2147483648"),
        ({"input_ids": [5, "six", 7, 8], "loss_mask": MASK}, Reason.BAD_TOKENS, "'six'"),
        ({"input_ids": [5, 6.5, 7, 8], "loss_mask": MASK}, Reason.BAD_TOKENS, "6.5"),
        ({"input_ids": [5, None, 7, 8], "loss_mask": MASK}, Reason.BAD_TOKENS, "None"),
        ({"input_ids": [5, float("nan"), 7, 8], "loss_mask": MASK}, Reason.BAD_TOKENS, "nan"),
        ({"input_ids": [IDS, IDS], "loss_mask": MASK}, Reason.BAD_TOKENS, "not whole numbers"),
        (
            {"input_ids": IDS, "labels": [-100, 7, 8, -100]},
            Reason.BAD_TOKENS,
            "must not be shifted",
        ),
        ({"input_ids": IDS, "loss_mask": [0] * 4}, Reason.NO_ASSISTANT_TURN, "supervises no token"),
        ({"input_ids": [], "loss_mask": []}, Reason.NO_ASSISTANT_TURN, "supervises no token"),
        (
            {"input_ids": IDS, "loss_mask": MASK, "attention_mask": [1, 0, 1, 1]},
            Reason.BAD_TOKENS,
            "gaps",
        ),
    ],
)
def test_lists_that_do_not_fit_are_dropped_with_what_is_wrong(
    record: dict[str, object], reason: Reason, detail: str
) -> None:
    with pytest.raises(RejectedRecord) as caught:
        normalise(record, location="here")
    assert caught.value.reason is reason
    assert detail in caught.value.detail


def test_turns_come_before_ids_which_are_then_named() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = normalise({"messages": turns, "input_ids": IDS, "loss_mask": MASK}, location="here")
    assert found.conversation.tokens is None
    assert found.unread == ("input_ids", "loss_mask")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a", "response": "b", "attention_mask": [1, 1, 1, 1]},
        {"instruction": "a", "output": "b", "labels": [-100, -100, 7, 8]},
        {"question": "a", "answer": "b", "loss_mask": MASK},
    ],
)
def test_question_and_answer_come_before_ids_too(fields: dict[str, object]) -> None:
    found = normalise({"input_ids": IDS, **fields}, location="here")
    assert [one.content for one in found.conversation.messages] == ["a", "b"]
    assert found.conversation.tokens is None
    assert "input_ids" in found.unread


def test_a_question_alone_is_a_column_beside_ids() -> None:
    record = {"input_ids": IDS, "loss_mask": MASK, "prompt": "a"}
    found = normalise(record, location="here")
    assert (found.conversation.tokens, found.unread) == (ROW, ("prompt",))
    asked = normalise(record, location="here", questions_suffice=True).conversation
    assert [one.content for one in asked.messages] == ["a"]


def test_ids_are_no_questions() -> None:
    with pytest.raises(RejectedRecord, match="cannot answer them again"):
        normalise({"input_ids": IDS, "loss_mask": MASK}, location="here", questions_suffice=True)


def tokens(prompt: list[int], *answer: int) -> Conversation:
    mask = (*(False for _ in prompt), *(True for _ in answer))
    return Conversation(
        conversation_id="c",
        messages=(),
        tokens=TokenRow(input_ids=(*prompt, *answer), loss_mask=mask),
    )


def test_one_prompt_is_in_one_split() -> None:
    assert question_key(tokens(IDS, 7)) == question_key(tokens(IDS, 8, 9))
    assert question_key(tokens(IDS, 7)) != question_key(tokens([4, 6, 7, 8], 7))
    text = Conversation(conversation_id="c", messages=(Message(role="user", content="a"),))
    assert question_key(tokens(IDS, 7)) != question_key(text)


@pytest.mark.parametrize("prompt", [[], [1], [1, 2], [1, 2, 3]])
def test_ids_without_a_question_are_not_all_in_one_split(prompt: list[int]) -> None:
    """Supervised from the first token, or behind a begin-of-text token and a role's marker."""
    keys = {question_key(tokens(prompt, 7, number)) for number in range(50)}
    assert len(keys) == 50
    assert question_key(tokens(prompt, 7)) == question_key(tokens(prompt, 7))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_files_of_ids_give_equal_data_sets(tmp_path: Path, kind: str) -> None:
    rows = [{"input_ids": [1, 2, 3 + number, 4], "loss_mask": MASK} for number in range(20)]
    path = tmp_path / f"ids.{kind}"
    table = pa.Table.from_pylist(rows)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(table, path)
    else:
        feather.write_feather(table, str(path), compression="uncompressed")
    config = DatasetConfig(name="ids", source=str(path), held_out_fraction=0.0)
    manifest = build_dataset(config, out_dir=tmp_path / "out")
    assert (manifest.num_train, manifest.unread) == (20, {})
    found = list(load_conversations(tmp_path / "out", "train"))
    assert [one.tokens.input_ids for one in found if one.tokens] == [
        tuple(row["input_ids"]) for row in rows
    ]
    assert np.array([one.tokens.loss_mask for one in found if one.tokens]).sum() == 40
