"""Regenerate a data set's answers with the target, turn by turn, as a new data set.

Every later question follows the target's own earlier answers, as in serving. A conversation is
answered once: it is in the journal before it counts. What the server refused or broke off is in the
journal too, and asked again by the next run, after the new questions. The ledger lists every
conversation without an answer, and train + held out + dropped = conversations of the source.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from eagle_core.data.build import RULES_VERSION
from eagle_core.data.ledger import Change
from eagle_core.data.manifest import DatasetManifest, SourceCounts, load_manifest
from eagle_core.data.writer import building, digests, open_writers, publish
from eagle_core.errors import ConfigError, MismatchError
from eagle_core.regeneration.answered_dataset import AnsweredDataset
from eagle_core.regeneration.answers import ASKED_AGAIN, AnswerSource
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.regeneration.dialogue import answer_conversation
from eagle_core.regeneration.failures_in_a_row import FailuresInARow
from eagle_core.regeneration.journal import AnswerJournal, FinishedConversation
from eagle_core.regeneration.source_rows import SourceRow, source_rows

OnFinished = Callable[[FinishedConversation], None]

REGENERATION_VERSION = 1
"""Increment it when the same answers give another data set, or the same settings other answers."""
_ANSWER_RULES = 2
"""Increment it when journals stay valid, but say something else: data sets are written again."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Regenerated:
    """Result of a run."""

    manifest: DatasetManifest
    num_asked: int
    """Conversations that were sent in this run; the others were in the journal."""
    num_answered: int
    """Of these, with a new answer."""
    num_tokens: int
    """Tokens of this run's answers."""
    examples: Mapping[str, str] = field(default_factory=dict)
    """A detail, such as the server's words, for every reason to drop; empty if nothing was done."""


@dataclass(kw_only=True, slots=True)
class _Counts:
    """What this run did."""

    asked: int = 0
    answered: int = 0
    tokens: int = 0


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
        self._counts = _Counts()
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
        is_complete = not ASKED_AGAIN & manifest.dropped.keys()
        is_complete &= Change.ENDED_BEFORE_UNANSWERED not in manifest.changed
        return manifest if is_complete else None

    def run(self, *, on_finished: OnFinished = lambda _finished: None) -> Regenerated:
        """Answer the remaining questions, write the data set, and return the result.

        Calls `on_finished` for every conversation, those in the journal first.

        Raises:
            TransientError: the server is unreachable; finished answers are kept, run again.
            ConfigError: the journal is in use, the server refuses every question, or no answer can
                be trained on.

        """
        if finished := self.finished():
            return Regenerated(manifest=finished, num_asked=0, num_answered=0, num_tokens=0)
        self._out_dir.mkdir(parents=True, exist_ok=True)
        context_tokens = self._config.context_tokens
        with AnswerJournal(self.journal_path, context_tokens=context_tokens) as journal:
            with self._answers.ready() if self._is_any_left(journal) else nullcontext():
                asyncio.run(self._ask_all(journal, on_finished))
            manifest, examples = self._write(journal)
        return Regenerated(
            manifest=manifest,
            num_asked=self._counts.asked,
            num_answered=self._counts.answered,
            num_tokens=self._counts.tokens,
            examples=examples,
        )

    def _rows(self) -> Iterator[SourceRow]:
        return source_rows(self._source, num_answers=self._config.num_answers)

    def _is_any_left(self, journal: AnswerJournal) -> bool:
        """Return whether a question is to be asked: loading the target for nothing takes long."""
        found = ((entry, entry.find(journal)) for entry in self._rows())
        return any(one is None or not entry.is_settled(one) for entry, one in found)

    async def _ask_all(self, journal: AnswerJournal, on_finished: OnFinished) -> None:
        """Ask the new questions, then those that the server refused or broke off before."""
        again: list[SourceRow] = []
        try:
            new = self._new_rows(journal, again, on_finished)
            if refused := await self._ask(new, journal, on_finished):
                raise ConfigError(
                    f"{refused.num_refusals} questions in a row had no answer, the last with "
                    f"{refused.last_words}; correct the server or the settings and run again: "
                    "these questions are asked again, finished answers are kept"
                )
            if refused := await self._ask(iter(again), journal, on_finished):
                logger.warning(
                    "questions that were refused before are refused again, the last with %s; the "
                    "rest of them wait for the next run",
                    refused.last_words,
                )
        finally:
            await self._answers.close()

    def _new_rows(
        self, journal: AnswerJournal, again: list[SourceRow], on_finished: OnFinished
    ) -> Iterator[SourceRow]:
        """Yield what was never asked or only begun; put what is asked again into `again`."""
        for entry in self._rows():
            found = entry.find(journal)
            if found is not None and found.is_asked_again:
                again.append(entry)
            elif found is None or not entry.is_settled(found):
                yield entry
            else:
                on_finished(found)

    async def _ask(
        self, todo: Iterator[SourceRow], journal: AnswerJournal, on_finished: OnFinished
    ) -> FailuresInARow | None:
        """Keep `concurrency` conversations in flight until all are done; an error stops all.

        Returns the row of refusals that ended it early, if one did.
        """
        failures = FailuresInARow(self._answers.concurrency)

        async def work() -> bool:
            for entry in todo:
                async with failures.asking():
                    earlier = entry.find(journal)
                    finished = await answer_conversation(
                        entry, earlier, self._answers, self._config
                    )
                    journal.add(finished)
                    failures.add(finished, has_new_answers=self._count(finished, earlier))
                    on_finished(finished)
                if await failures.only_refusals():
                    return False
            return True

        workers = [asyncio.create_task(work()) for _ in range(self._answers.concurrency)]
        try:
            return None if all(await asyncio.gather(*workers)) else failures
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def _count(self, finished: FinishedConversation, earlier: FinishedConversation | None) -> bool:
        """Count a conversation; return whether it has new answers."""
        has_new_answers = len(finished.answers) > (len(earlier.answers) if earlier else 0)
        self._counts.asked += 1
        self._counts.answered += has_new_answers
        self._counts.tokens += finished.num_tokens - (earlier.num_tokens if earlier else 0)
        return has_new_answers

    def _write(self, journal: AnswerJournal) -> tuple[DatasetManifest, Mapping[str, str]]:
        asked = self._source_manifest
        with building(self._out_dir) as directory:
            with open_writers(directory) as writers:
                builder = AnsweredDataset(asked.name, writers, sources=asked.by_source)
                for entry in self._rows():
                    builder.add(entry, entry.find(journal))
            if builder.num_records != asked.num_conversations * self._config.num_answers:
                raise MismatchError(
                    f"{self._source} changed while its questions were answered; run again"
                )
            dropped = dict(sorted(writers.ledger.dropped.items()))
            if not builder.kept["train"]:
                context = "" if self._config.engine is None else " regeneration.context_tokens,"
                raise ConfigError(
                    f"no conversation of {asked.name} has an answer that can be "
                    f"trained on (dropped: {dropped}{_such_as(dropped, builder.examples)}); check "
                    f"the server,{context} regeneration.max_tokens and regeneration.cut_answers. "
                    f"{self.journal_path} keeps what is final, such as context_too_long; delete it "
                    "to ask everything again"
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
                by_source=self._by_source(builder),
                files=digests(directory),
            )
            publish(manifest, directory, self._out_dir)
        return manifest, builder.examples

    def _by_source(self, builder: AnsweredDataset) -> dict[str, SourceCounts]:
        """Return how many conversations of each of the questions' sources were answered."""
        return {
            name: SourceCounts(
                num_records=(asked.num_train + asked.num_held_out) * self._config.num_answers,
                num_train=builder.kept_by_source[name, "train"],
                num_held_out=builder.kept_by_source[name, "held_out"],
            )
            for name, asked in self._source_manifest.by_source.items()
        }

    def _manifest_config(self) -> dict[str, object]:
        return {
            "regeneration": {**self._identity, **self._config.scope()},
            "answer_rules": _ANSWER_RULES,
        }

    def _manifest_source(self) -> tuple[dict[str, object], ...]:
        manifest = self._source_manifest
        return ({"data_set": manifest.name, "fingerprint": manifest.fingerprint},)


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


def _such_as(dropped: Mapping[str, int], examples: Mapping[str, str]) -> str:
    """Return an example of the most frequent reason."""
    most = max(dropped, key=lambda reason: dropped[reason], default="")
    return f", such as {examples[most]}" if examples.get(most) else ""
