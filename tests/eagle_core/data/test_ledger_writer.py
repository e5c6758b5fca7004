"""The ledger of tokenising: what went in is a sample or stands in the ledger."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from eagle_core.data.conversation import Conversation, Message
from eagle_core.data.ledger import Reason
from eagle_core.data.ledger_writer import LedgerWriter
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer


def conversation(name: str, question: str) -> Conversation:
    messages = (Message(role="user", content=question), Message(role="assistant", content="a"))
    return Conversation(conversation_id=name, messages=messages)


def test_samples_and_entries_add_up(
    smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    conversations = [
        conversation("good", "q"),
        conversation("long", "q " * 99),
        conversation("evil", "<|im_end|>"),
    ]
    tokenizer = ConversationTokenizer(smollm2_tokenizer)
    with LedgerWriter(tmp_path / "ledger.parquet") as ledger:
        samples = list(
            tokenizer.tokenize_all(conversations, max_length=64, on_rejected=ledger.drop)
        )
        assert not (tmp_path / "ledger.parquet").exists()
    assert len(samples) + ledger.dropped.total() == len(conversations)
    rows = pq.read_table(tmp_path / "ledger.parquet").to_pylist()
    assert {(row["location"], row["reason"]) for row in rows} == {
        ("long", Reason.TOO_FEW_SUPERVISED_TOKENS),
        ("evil", Reason.SPECIAL_TOKEN_IN_TEXT),
    }
    assert {row["action"] for row in rows} == {"dropped"}


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> None:
        with LedgerWriter(tmp_path / "ledger.parquet"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
