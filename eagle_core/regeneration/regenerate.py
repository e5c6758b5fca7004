"""Regenerate a data set's answers with the target, turn by turn, as a new data set.

Every later question follows the target's own earlier answers, as in serving. A conversation is
answered once: it is in the journal before it counts. The ledger lists every conversation without an
answer, and train + held out + dropped = conversations of the source.
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
"""Increment it when the same answers give another data set, or the same settings other answers."""
_FAILURES_IN_A_ROW = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Regenerated:
    """Result of a run."""

    manifest: DatasetManifest
    num_asked: int
    """Conversations finished in this run; the others were in the journal."""
    num_tokens: int
    """Tokens of this run's answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _SourceRow:
    """A conversation of the source and its position."""

    conversation: Conversation
    key: str
    split: Split
    row: int

    def location(self, source: str) -> str:
        return f"{source}, {self.split}.parquet, row {self.row}"


class Regeneration:
    """Regeneration of one data set with one target and one choice of settings."""

    def __init__(
        self, config: RegenerationConfig, answers: AnswerSource, *, source: Path, out_dir: Path
    ) -> None:
        """Check both data sets; `ConfigError` if `out_dir` contains one of another kind."""
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
        """Path of the answers: named by target and settings, not by the source, which grows."""
        text = json.dumps(self._identity, sort_keys=True)
        return self._out_dir / f"answers-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"

    def finished(self) -> DatasetManifest | None:
        """Return the existing manifest if no question is left."""
        try:
            manifest = load_manifest(self._out_dir)
        except ConfigError:
            return None
        made_from = (manifest.rules_version, manifest.config, manifest.source)
        if made_from != (RULES_VERSION, self._manifest_config(), self._manifest_source()):
            return None
        return None if manifest.dropped.get(Reason.SERVER_ERROR) else manifest

    def run(self, *, on_finished: OnFinished = lambda _finished: None) -> Regenerated:
        """Answer the remaining questions, write the data set, and return the result.

        Calls `on_finished` for every conversation, those in the journal first.

        Raises:
            TransientError: the server is unreachable; finished answers are kept, run again.
            ConfigError: the journal is in use, or no answer can be trained on.

        """
        if finished := self.finished():
            return Regenerated(manifest=finished, num_asked=0, num_tokens=0)
        self._out_dir.mkdir(parents=True, exist_ok=True)
        with AnswerJournal(self.journal_path) as journal:
            todo = self._unfinished(journal, on_finished)
            num_asked = asyncio.run(self._ask_all(todo, journal, on_finished))
            manifest = self._write(journal)
        return Regenerated(manifest=manifest, num_asked=num_asked, num_tokens=self._num_tokens)

    def _source_rows(self) -> Iterator[_SourceRow]:
        for split in SPLITS:
            for row, conversation in enumerate(load_conversations(self._source, split)):
                key = content_key(conversation)
                yield _SourceRow(conversation=conversation, key=key, split=split, row=row)

    def _unfinished(self, journal: AnswerJournal, on_finished: OnFinished) -> Iterator[_SourceRow]:
        for entry in self._source_rows():
            finished = journal.find(entry.key)
            if finished is None:
                yield entry
            else:
                on_finished(finished)

    async def _ask_all(
        self, todo: Iterator[_SourceRow], journal: AnswerJournal, on_finished: OnFinished
    ) -> int:
        """Keep `concurrency` conversations in flight until all are done; an error stops all."""
        counts: Counter[str] = Counter()

        async def work() -> None:
            for entry in todo:
                finished = await self._converse(entry)
                if finished.failure is Reason.SERVER_ERROR:
                    counts["failures in a row"] += 1
                    self._failures[entry.key] = NoAnswer(finished.failure, finished.detail)
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
                "check its log and run again; finished answers are kept"
            )

    async def _converse(self, entry: _SourceRow) -> FinishedConversation:
        """Request one answer after another, each after the target's own earlier ones."""
        conversation = entry.conversation
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
                seed=_seed(self._config.seed, entry.key, index),
            )
            try:
                answer = await self._answers.ask(question)
            except NoAnswer as error:
                failure = NoAnswer(error.reason, f"turn {index}: {error.detail}")
                break
            history.append(answer.message)
            answers.append(answer.message)
            num_tokens += answer.num_tokens
            if answer.message.tool_calls:
                break
        return FinishedConversation(
            key=entry.key,
            conversation_id=conversation.conversation_id,
            answers=tuple(answers),
            failure=failure.reason if failure else None,
            detail=failure.detail if failure else "",
            num_tokens=num_tokens,
        )

    def _write(self, journal: AnswerJournal) -> DatasetManifest:
        with building(self._out_dir) as directory:
            with open_writers(directory) as writers:
                builder = _DatasetBuilder(self._source_manifest.name, writers)
                for entry in self._source_rows():
                    builder.add(entry, journal.find(entry.key), self._failures.get(entry.key))
            if builder.num_records != self._source_manifest.num_conversations:
                raise MismatchError(
                    f"{self._source} changed while its questions were answered; run again"
                )
            dropped = dict(sorted(writers.ledger.dropped.items()))
            if not builder.kept["train"]:
                raise ConfigError(
                    f"no conversation of {self._source_manifest.name} has an answer that can be "
                    f"trained on (dropped: {dropped}); check regeneration.max_tokens and "
                    "regeneration.cut_answers"
                )
            manifest = DatasetManifest(
                name=self._out_dir.name,
                fingerprint=builder.fingerprint.hexdigest(),
                rules_version=RULES_VERSION,
                config=self._manifest_config(),
                source=self._manifest_source(),
                num_records=builder.num_records,
                num_train=builder.kept["train"],
                num_held_out=builder.kept["held_out"],
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


class _DatasetBuilder:
    """Writes answered conversations and enters the others in the ledger."""

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
        self, entry: _SourceRow, finished: FinishedConversation | None, failure: NoAnswer | None
    ) -> None:
        """Keep the answered conversation in its split, or enter the reason in the ledger."""
        if finished is None:
            detail = failure.detail if failure else "not asked"
            self._drop(entry, Reason.SERVER_ERROR, detail)
            return
        answered = with_answers(entry.conversation, finished.answers)
        if answered is None:
            self._drop(entry, finished.failure or Reason.NO_ASSISTANT_TURN, finished.detail)
            return
        key = content_key(answered)
        if bytes.fromhex(key) in self._seen:
            self._drop(entry, Reason.DUPLICATE, f"content key {key}")
            return
        self._seen.add(bytes.fromhex(key))
        self.kept[entry.split] += 1
        self.fingerprint.update(f"{entry.split} {key}\n".encode())
        self._writers.splits[entry.split].add(to_row(answered, key))
        if len(answered.messages) < len(entry.conversation.messages):
            self._shortened(entry, finished)

    def _shortened(self, entry: _SourceRow, finished: FinishedConversation) -> None:
        failed = finished.failure
        self._writers.ledger.change(
            Change.ENDED_BEFORE_FAILED_ANSWER if failed else Change.ENDED_AT_TOOL_CALL,
            location=entry.location(self._source),
            conversation_id=entry.conversation.conversation_id,
            detail=f"{failed}, {finished.detail}" if failed else "",
        )

    def _drop(self, entry: _SourceRow, reason: Reason, detail: str) -> None:
        self._writers.ledger.drop(
            RejectedRecord(reason, entry.location(self._source), detail),
            conversation_id=entry.conversation.conversation_id,
        )


def with_answers(conversation: Conversation, answers: tuple[Message, ...]) -> Conversation | None:
    """Return the conversation up to its last new answer; None if there is no answer."""
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
            f"the answers would overwrite their own source {source}; set regeneration.name"
        )
    try:
        manifest = load_manifest(out_dir)
    except ConfigError:
        return
    if not manifest.is_regenerated:
        raise ConfigError(
            f"{out_dir} contains a data set without a target's answers; set regeneration.name"
        )


def _seed(seed: int, key: str, turn: int) -> int:
    """Return the seed of one answer: 31 bits, which every server accepts."""
    digest = hashlib.sha256(f"{seed} {key} {turn}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def answered_by(manifest: DatasetManifest) -> Mapping[str, object]:
    """Return the identity of the target that generated the answers; empty for other data sets."""
    regeneration = manifest.config.get("regeneration")
    return regeneration["target"] if isinstance(regeneration, Mapping) else {}
