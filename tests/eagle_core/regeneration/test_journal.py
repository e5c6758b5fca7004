"""The journal: damaged lines, two writers, and lines of earlier versions."""

import shutil
from pathlib import Path

import pytest

from eagle_core.data.build import load_conversations
from eagle_core.data.conversation import Conversation, Message
from eagle_core.data.ledger import Reason
from eagle_core.errors import ConfigError
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.regeneration.journal import AnswerJournal, FinishedConversation
from eagle_core.regeneration.regenerate import Regeneration
from eagle_core.regeneration.server import AnswerServer
from tests.eagle_core.regeneration.answer_server import Server, serving
from tests.eagle_core.regeneration.runs import Make, conversations, questions, write_dataset

OLD = Path(__file__).with_name("answers-bbafda7ed60a628b.jsonl")
"""Written by the version before refusals were asked again, about the questions below."""


def old_journal(out_dir: Path) -> Path:
    out_dir.mkdir()
    shutil.copy(OLD, out_dir)
    return out_dir


def regeneration(server: Server, source: Path, out_dir: Path) -> Regeneration:
    config = RegenerationConfig(base_url=server.url, attempts=1, cut_answers="keep")
    answers = AnswerServer(config, model="m", api_key=None)
    return Regeneration(config, answers, source=source, out_dir=out_dir)


def test_an_earlier_versions_journal_is_taken_over(made: Make, tmp_path: Path) -> None:
    source, out_dir = made(questions(5)), old_journal(tmp_path / "out")
    with serving() as server:
        run = regeneration(server, source, out_dir)
        assert run.journal_path.name == OLD.name
        done = run.run()
        asked = {
            number
            for number in range(5)
            if any(f"question {number}." in text for text in server.asked)
        }
    assert asked == {1, 2}  # the refused ones, and of the second its last turn only
    assert (done.num_asked, server.asked.total()) == (2, 3)
    assert done.manifest.dropped == {"answer_cut": 1, "context_too_long": 1}
    kept = {one.conversation_id: one.messages for one in conversations(out_dir)}
    assert [message.content for message in kept["c2"]] == [
        *("question 2.0", "re(1): question 2.0", "question 2.1", "re(3): question 2.1")
    ]
    assert "<think>" not in str(kept)


def test_a_data_set_of_an_earlier_version_is_written_again_from_its_journal(
    made: Make, tmp_path: Path
) -> None:
    source, out_dir = made(questions(5)), old_journal(tmp_path / "out")
    with serving() as server:
        run = regeneration(server, source, out_dir)
        done = run.run()
        path = out_dir / "manifest.json"
        manifest = done.manifest
        config = {name: value for name, value in manifest.config.items() if name == "regeneration"}
        path.write_text(
            manifest.model_copy(update={"config": config}).model_dump_json(), encoding="utf-8"
        )
        before = server.asked.total()
        again = regeneration(server, source, out_dir).run()
        assert server.asked.total() == before
    assert again.manifest == manifest


def test_a_last_question_is_asked_after_the_answers_from_before(made: Make, tmp_path: Path) -> None:
    """Data sets used to lose a question without an answer at their conversations' end."""
    records = questions(6)
    records[5]["messages"] = records[5]["messages"][:2]  # type: ignore[index]
    (given,) = [one for one in conversations(made(records)) if one.conversation_id == "c5"]
    more = Message(role="user", content="question 5.1")
    longer = Conversation(conversation_id="c5", messages=(*given.messages, more))
    source, out_dir = write_dataset([longer], tmp_path / "longer"), old_journal(tmp_path / "out")
    with serving() as server:
        done = regeneration(server, source, out_dir).run()
        assert server.asked.total() == 1
    assert done.manifest.changed == {}
    (kept,) = load_conversations(out_dir, "train")
    assert [message.content for message in kept.messages] == [
        *("question 5.0", "re(1): question 5.0", "question 5.1", "re(3): question 5.1")
    ]


def test_a_later_line_replaces_an_earlier_one(tmp_path: Path) -> None:
    again = FinishedConversation(
        key="0" * 32, conversation_id="c", answers=(), failure=Reason.REQUEST_REFUSED
    )
    answer = Message(role="assistant", content="a")
    with AnswerJournal(tmp_path / "journal") as journal:
        journal.add(again)
        found = journal.find(again.key)
        assert found is not None
        assert found.is_asked_again
        journal.add(FinishedConversation(key=again.key, conversation_id="c", answers=(answer,)))
    with AnswerJournal(tmp_path / "journal") as journal:
        found = journal.find(again.key)
        assert found is not None
        assert found.answers == (answer,)
        assert not found.is_asked_again


def finished(number: int) -> FinishedConversation:
    return FinishedConversation(key=f"{number:032x}", conversation_id=str(number), answers=())


@pytest.mark.parametrize("how", ["torn", "flipped", "newline"])
def test_a_damaged_line_is_as_if_it_had_not_been_written(tmp_path: Path, how: str) -> None:
    path = tmp_path / "journal"
    with AnswerJournal(path) as journal:
        for number in range(4):
            journal.add(finished(number))
    data = bytearray(path.read_bytes())
    lines = bytes(data).splitlines(keepends=True)
    if how == "torn":
        path.write_bytes(data[:-5])
        lost = {3}
    elif how == "flipped":
        data[len(lines[0]) + 40] ^= 1
        path.write_bytes(data)
        lost = {1}
    else:
        path.write_bytes(data[: len(lines[0]) + 30] + b"\n" + data[len(lines[0]) + 30 :])
        lost = {1}
    for _attempt in range(2):  # what was lost is written once more, and all is found afterwards
        with AnswerJournal(path) as journal:
            assert {number for number in range(4) if finished(number).key not in journal} == lost
            assert bool(journal.num_damaged) == (lost != set() or how != "torn" or _attempt == 1)
            for number in sorted(lost):
                journal.add(finished(number))
            assert journal.find(finished(2).key) == finished(2)
            lost = set()


def test_two_runs_never_write_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with AnswerJournal(path), pytest.raises(ConfigError, match="in use"), AnswerJournal(path):
        pass


def test_a_conversation_that_was_too_long_is_asked_again_with_another_context(
    tmp_path: Path,
) -> None:
    answer = Message(role="assistant", content="yes")
    finished = FinishedConversation(
        key="0" * 32,
        conversation_id="long",
        answers=(answer,),
        failure=Reason.CONTEXT_TOO_LONG,
        detail="turn 3: 700 tokens",
        context_tokens=512,
    )
    path = tmp_path / "answers.jsonl"
    with AnswerJournal(path, context_tokens=512) as journal:
        journal.add(finished)
        assert journal.find(finished.key) == finished
    with AnswerJournal(path, context_tokens=1024) as journal:
        found = journal.find(finished.key)
    assert found is not None
    assert (found.answers, found.failure) == ((answer,), None)
