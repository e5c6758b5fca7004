"""Answers from the target itself: a data set's questions, answered turn by turn, as a new data set.

Every later question comes after the target's own earlier answers, as it does when serving. A
conversation is asked about once: it is in the journal before it counts. Whatever the target did
not answer is in the ledger, and train + held out + dropped = conversations asked about.
"""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from eagle_core.data.build import RULES_VERSION, load_conversations
from eagle_core.data.conversation import Conversation, Message, content_key
from eagle_core.data.conversation_table import to_row
from eagle_core.data.ledger import Change, Reason, RejectedRecord
from eagle_core.data.manifest import DatasetManifest, load_manifest
from eagle_core.data.writer import (
    SPLITS,
    DatasetWriters,
    Split,
    building,
    digests,
    open_writers,
    publish,
)
from eagle_core.errors import ConfigError, MismatchError, TransientError
from eagle_core.regeneration.answers import AnswerSource, NoAnswer, Question
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.regeneration.journal import AnswerJournal, FinishedConversation

OnFinished = Callable[[FinishedConversation], None]

REGENERATION_VERSION = 1
"""Raise it when the same answers would make another data set, or the same settings other ones."""
_FAILURES_IN_A_ROW = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Regenerated:
    """What was done."""

    manifest: DatasetManifest
    num_asked: int
    """Conversations finished now; the others were in the journal."""
    num_tokens: int
    """Of the answers that came now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """A conversation of the source and where it stands."""

    conversation: Conversation
    key: str
    split: Split
    row: int

    def location(self, source: str) -> str:
        return f"{source}, {self.split}.parquet, row {self.row}"


class Regeneration:
    """One data set's questions for one target with one choice of settings."""

    def __init__(
        self, config: RegenerationConfig, answers: AnswerSource, *, source: Path, out_dir: Path
    ) -> None:
        """Look at both data sets; `ConfigError` if `out_dir` holds one of another kind."""
        self._config = config
        self._answers = answers
        self._source = source
        self._source_manifest = load_manifest(source)
        self._out_dir = out_dir
        self._identity = {
            "version": REGENERATION_VERSION,
            "target": dict(answers.identity()),
            **config.identity(),
        }
        self._failures: dict[str, NoAnswer] = {}
        self._num_tokens = 0
        refuse_other_kind(source, out_dir)

    @property
    def journal_path(self) -> Path:
        """Where answers are kept: named by target and settings, not by the source, which grows."""
        text = json.dumps(self._identity, sort_keys=True)
        return self._out_dir / f"answers-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"

    def finished(self) -> DatasetManifest | None:
        """Return the manifest of what is there if nothing is left to ask."""
        try:
            manifest = load_manifest(self._out_dir)
        except ConfigError:
            return None
        made_from = (manifest.rules_version, manifest.config, manifest.source)
        if made_from != (RULES_VERSION, self._manifest_config(), self._manifest_source()):
            return None
        return None if manifest.dropped.get(Reason.SERVER_ERROR) else manifest

    def run(self, *, on_finished: OnFinished = lambda _finished: None) -> Regenerated:
        """Ask what was never answered, write the data set, and return what was done.

        Calls `on_finished` for every conversation, those of the journal first.

        Raises:
            TransientError: the server is gone; what is answered is kept, run again.
            ConfigError: the journal is in use, or nothing was answered that can be trained on.

        """
        if finished := self.finished():
            return Regenerated(manifest=finished, num_asked=0, num_tokens=0)
        self._out_dir.mkdir(parents=True, exist_ok=True)
        with AnswerJournal(self.journal_path) as journal:
            todo = self._unfinished(journal, on_finished)
            num_asked = asyncio.run(self._ask_all(todo, journal, on_finished))
            manifest = self._write(journal)
        return Regenerated(manifest=manifest, num_asked=num_asked, num_tokens=self._num_tokens)

    def _places(self) -> Iterator[_Place]:
        for split in SPLITS:
            for row, conversation in enumerate(load_conversations(self._source, split)):
                key = content_key(conversation)
                yield _Place(conversation=conversation, key=key, split=split, row=row)

    def _unfinished(self, journal: AnswerJournal, on_finished: OnFinished) -> Iterator[_Place]:
        for place in self._places():
            finished = journal.find(place.key)
            if finished is None:
                yield place
            else:
                on_finished(finished)

    async def _ask_all(
        self, todo: Iterator[_Place], journal: AnswerJournal, on_finished: OnFinished
    ) -> int:
        """Keep `concurrency` conversations open until none is left; the first error ends all."""
        counts: Counter[str] = Counter()

        async def work() -> None:
            for place in todo:
                finished = await self._converse(place)
                if finished.failure is Reason.SERVER_ERROR:
                    counts["failures in a row"] += 1
                    self._failures[place.key] = NoAnswer(finished.failure, finished.detail)
                    self._require_some_success(counts["failures in a row"], finished.detail)
                    continue
                journal.add(finished)
                counts["failures in a row"] = 0
                counts["asked"] += 1
                self._num_tokens += finished.num_tokens
                on_finished(finished)

        workers = [asyncio.create_task(work()) for _ in range(self._answers.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self._answers.close()
        return counts["asked"]

    def _require_some_success(self, failures: int, detail: str) -> None:
        if failures >= max(_FAILURES_IN_A_ROW, 2 * self._answers.concurrency):
            raise TransientError(
                f"the server failed {failures} conversations in a row, the last with {detail}; "
                "look at its log and run again: what is answered is kept"
            )

    async def _converse(self, place: _Place) -> FinishedConversation:
        """Ask for one answer after another, each after the target's own earlier ones."""
        conversation = place.conversation
        history: list[Message] = []
        answers: list[Message] = []
        num_tokens = 0
        failure: NoAnswer | None = None
        if conversation.rendered_text:
            failure = NoAnswer(Reason.NO_MESSAGES, "rendered text has no questions to ask")
        for index, message in enumerate(conversation.messages):
            if message.role == "tool":
                break  # the result of a call that the target did not make
            if message.role != "assistant":
                history.append(message)
                continue
            question = Question(
                messages=tuple(history),
                tools=conversation.tools,
                seed=_seed(self._config.seed, place.key, index),
            )
            try:
                answer = await self._answers.ask(question)
            except NoAnswer as none:
                failure = NoAnswer(none.reason, f"turn {index}: {none.detail}")
                break
            history.append(answer.message)
            answers.append(answer.message)
            num_tokens += answer.num_tokens
            if answer.message.tool_calls:
                break
        return FinishedConversation(
            key=place.key,
            conversation_id=conversation.conversation_id,
            answers=tuple(answers),
            failure=failure.reason if failure else None,
            detail=failure.detail if failure else "",
            num_tokens=num_tokens,
        )

    def _write(self, journal: AnswerJournal) -> DatasetManifest:
        with building(self._out_dir) as directory:
            with open_writers(directory) as writers:
                accounts = _Accounts(self._source_manifest.name, writers)
                for place in self._places():
                    accounts.add(place, journal.find(place.key), self._failures.get(place.key))
            if accounts.num_records != self._source_manifest.num_conversations:
                raise MismatchError(
                    f"{self._source} changed while its questions were asked; run again"
                )
            dropped = dict(sorted(writers.ledger.dropped.items()))
            if not accounts.kept["train"]:
                raise ConfigError(
                    f"no conversation of {self._source_manifest.name} was answered so that it can "
                    f"be trained on (dropped: {dropped}); see regeneration.max_tokens and "
                    "regeneration.cut_answers"
                )
            manifest = DatasetManifest(
                name=self._out_dir.name,
                fingerprint=accounts.fingerprint.hexdigest(),
                rules_version=RULES_VERSION,
                config=self._manifest_config(),
                source=self._manifest_source(),
                num_records=accounts.num_records,
                num_train=accounts.kept["train"],
                num_held_out=accounts.kept["held_out"],
                dropped=dropped,
                changed=dict(sorted(writers.ledger.changed.items())),
                files=digests(directory),
            )
            publish(manifest, directory, self._out_dir)
        return manifest

    def _manifest_config(self) -> dict[str, object]:
        return {"regeneration": self._identity}

    def _manifest_source(self) -> tuple[dict[str, object], ...]:
        manifest = self._source_manifest
        return ({"data_set": manifest.name, "fingerprint": manifest.fingerprint},)


class _Accounts:
    """Writes what was answered and enters what was not."""

    def __init__(self, source: str, writers: DatasetWriters) -> None:
        self._source = source
        self._writers = writers
        self._seen: set[bytes] = set()
        self.fingerprint = hashlib.sha256()
        self.kept: Counter[Split] = Counter()

    @property
    def num_records(self) -> int:
        return self.kept.total() + self._writers.ledger.dropped.total()

    def add(
        self, place: _Place, finished: FinishedConversation | None, failure: NoAnswer | None
    ) -> None:
        """Keep the conversation as answered, in its own split, or enter why not."""
        if finished is None:
            detail = failure.detail if failure else "not asked about"
            self._drop(place, Reason.SERVER_ERROR, detail)
            return
        answered = with_answers(place.conversation, finished.answers)
        if answered is None:
            self._drop(place, finished.failure or Reason.NO_ASSISTANT_TURN, finished.detail)
            return
        key = content_key(answered)
        if bytes.fromhex(key) in self._seen:
            self._drop(place, Reason.DUPLICATE, f"of content {key}")
            return
        self._seen.add(bytes.fromhex(key))
        self.kept[place.split] += 1
        self.fingerprint.update(f"{place.split} {key}\n".encode())
        self._writers.splits[place.split].add(to_row(answered, key))
        if len(answered.messages) < len(place.conversation.messages):
            self._shortened(place, finished)

    def _shortened(self, place: _Place, finished: FinishedConversation) -> None:
        failed = finished.failure
        self._writers.ledger.change(
            Change.ENDED_BEFORE_FAILED_ANSWER if failed else Change.ENDED_AT_TOOL_CALL,
            location=place.location(self._source),
            conversation_id=place.conversation.conversation_id,
            detail=f"{failed}, {finished.detail}" if failed else "",
        )

    def _drop(self, place: _Place, reason: Reason, detail: str) -> None:
        self._writers.ledger.drop(
            RejectedRecord(reason, place.location(self._source), detail),
            conversation_id=place.conversation.conversation_id,
        )


def with_answers(conversation: Conversation, answers: tuple[Message, ...]) -> Conversation | None:
    """Return the conversation up to its last new answer; None if there is no answer at all."""
    remaining = iter(answers)
    messages: list[Message] = []
    for message in conversation.messages:
        if message.role != "assistant":
            messages.append(message)
            continue
        answer = next(remaining, None)
        if answer is None:
            break
        messages.append(answer)
    while messages and messages[-1].role != "assistant":
        messages.pop()
    return replace(conversation, messages=tuple(messages)) if messages else None


def refuse_other_kind(source: Path, out_dir: Path) -> None:
    """Raise `ConfigError` if a data set of another kind would be overwritten."""
    if source.resolve() == out_dir.resolve():
        raise ConfigError(
            f"the answers would replace their own source {source}; set regeneration.name"
        )
    try:
        manifest = load_manifest(out_dir)
    except ConfigError:
        return
    if not manifest.is_regenerated:
        raise ConfigError(
            f"{out_dir} holds a data set that is not answers of a target; set regeneration.name"
        )


def _seed(seed: int, key: str, turn: int) -> int:
    """Return the seed of one answer: 31 bits, which every server takes."""
    digest = hashlib.sha256(f"{seed} {key} {turn}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def answered_by(manifest: DatasetManifest) -> Mapping[str, object]:
    """Return what identifies the target that gave the answers; empty for another data set."""
    regeneration = manifest.config.get("regeneration")
    return regeneration["target"] if isinstance(regeneration, Mapping) else {}
