"""The questions of a benchmark set, from its file on the hub or from one in the same form.

The hub's file is downloaded once, at the commit that `sets` names. A record of another form is an
error that names it, never skipped; only what SPEED-Bench has no text for is, and it is counted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from eagle_core.data.config import DatasetConfig
from eagle_core.data.conversation import Message
from eagle_core.data.files.source_file import SourceFile
from eagle_core.data.hub.cached_file import cached_file
from eagle_core.data.ledger import RejectedRecord
from eagle_core.data.records.fields import is_list, parsed
from eagle_core.data.source_record import DamagedRecord, SourceRecord
from eagle_core.data.sources import find_source, read_strictly
from eagle_core.errors import ConfigError, CorruptError, TransientError
from eagle_core.evaluation.benchmarks.config import BenchmarkConfig
from eagle_core.evaluation.benchmarks.question import Question
from eagle_core.evaluation.benchmarks.sets import BENCHMARKS, BenchmarkSet, Record, has_text
from eagle_core.evaluation.prompt_file import asked_question, category_of

_SETS: Mapping[str, BenchmarkSet] = {str(name): one for name, one in BENCHMARKS.items()}


@dataclass(kw_only=True, slots=True)
class QuestionFile:
    """The file of one set, and what of it has no text."""

    config: BenchmarkConfig
    path: str
    source: str
    """What was read, exactly: a hub file with its commit, or a path with its digest."""
    num_without_text: int = field(default=0, init=False)
    """Records that hold a placeholder instead of a question, of those read so far."""

    @classmethod
    def find(cls, config: BenchmarkConfig) -> "QuestionFile":
        """Find the file, or download it.

        Raises:
            ConfigError: there is none.
            TransientError: the hub is unreachable, and the file is not in its cache.

        """
        if config.path is not None:
            return cls(config=config, path=config.path, source=_identity(config.path))
        known = _SETS[config.name]
        revision = config.revision or known.revision
        try:
            found = cached_file(known.repository, known.file, revision)
        except (ConfigError, TransientError) as error:
            raise type(error)(
                f"benchmark {config.name}: {error}. Or give a file in the form of {known.file}: "
                f"evaluation.benchmarks=[{{name: {config.name}, path: FILE}}]"
            ) from error
        source = f"hf://datasets/{known.repository}@{found.commit}/{known.file}"
        return cls(config=config, path=str(found.path), source=source)

    @property
    def is_categorised(self) -> bool:
        """Whether the chosen questions are spread over categories; a file of your own may be."""
        known = _SETS.get(self.config.name)
        return known is None or known.is_categorised

    def questions(self) -> Iterator[Question]:
        """Yield the questions in the order of the file.

        Raises:
            ConfigError: a record is no question of this set; names the record and what is expected.
            CorruptError: the file is damaged, or a record is too large; names the record.

        """
        known = _SETS.get(self.config.name)
        self.num_without_text = 0
        for record in read_strictly(self.config.name, self.path):
            if isinstance(record, DamagedRecord):
                raise CorruptError(
                    f"{record.location} of benchmark {self.config.name} cannot be read "
                    f"({record.reason}: {record.detail}); replace the file and run again"
                )
            question = _own(record) if known is None else _known(known, record, self.config.name)
            if question is None:
                self.num_without_text += 1
                continue
            yield question


def _known(known: BenchmarkSet, record: SourceRecord, name: str) -> Question | None:
    """Return the question of a named set; None if the record holds no text."""
    if not isinstance(record.value, Mapping):
        raise ConfigError(f"{record.location} of benchmark {name} is no record with columns")
    try:
        turns = known.turns(record.value)
    except ConfigError as error:
        raise ConfigError(
            f"{record.location} is no question of benchmark {name}: {error}. Correct the file, or "
            "give it another name to read it as evaluation.prompts are"
        ) from error
    return _asked(turns, record.value, record.location) if has_text(turns) else None


def _own(record: SourceRecord) -> Question:
    """Return the question of a file of one's own: all `turns`, or what a prompt file may hold."""
    turns = parsed(record.value.get("turns")) if isinstance(record.value, Mapping) else None
    if is_list(turns) and turns and all(isinstance(turn, str) for turn in turns):
        assert isinstance(record.value, Mapping)  # noqa: S101
        return _asked([str(turn) for turn in turns], record.value, record.location)
    try:
        asked = asked_question(record.value, location=record.location)
    except RejectedRecord as error:
        raise ConfigError(
            f"{record.location} of evaluation.benchmarks is not a question: {error}; expected what "
            "evaluation.prompts may hold"
        ) from error
    return Question(
        messages=asked.messages,
        tools=asked.tools,
        category=category_of(record.value),
        location=record.location,
    )


def _asked(turns: list[str], record: Record, location: str) -> Question:
    first, *later = turns
    return Question(
        messages=(Message(role="user", content=first),),
        later_turns=tuple(later),
        category=category_of(record),
        location=location,
    )


def _identity(path: str) -> str:
    """Return what was read: each file with its digest."""
    source = find_source(DatasetConfig(name="benchmark", source=path))
    if not isinstance(source, tuple):
        return f"{path}@{source.commit}"
    return ", ".join(map(_with_digest, source))


def _with_digest(file: SourceFile) -> str:
    return f"{file.path} ({file.digest()})"
