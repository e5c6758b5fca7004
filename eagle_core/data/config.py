"""Configuration of a data set."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from eagle_core.address import Address
from eagle_core.atomic_files import FOLDER_NAME
from eagle_core.config_model import ConfigModel
from eagle_core.data.columns import Columns
from eagle_core.data.conversation import Role
from eagle_core.data.presets import PRESETS

REGENERATED = "regenerated"
"""The source of a data set whose answers the target generated."""


_SOURCE = (
    "Source of the records: a path, a glob, any fsspec URL (s3://, https://, ...), "
    "`package:NAME` for the data file of an installed Python package (`package:NAME/PATH` "
    "if it has several), `hf:ORG/NAME` for a data set on the Hugging Face hub, "
    "`hf://datasets/ORG/NAME/PATH` for some of its files, "
    f"`preset:NAME` with one of {', '.join(sorted(PRESETS))}, or `{REGENERATED}` for the "
    "data set of this name that the flow `regenerate` built; it is used unchanged"
)


class SourceConfig(ConfigModel):
    """A source of conversations, how its records are read, and how many are taken."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(
        description="Short name; used for the output and in reports",
        pattern=FOLDER_NAME,
    )
    source: Address = Field(description=_SOURCE)
    format: Literal["auto", "json", "jsonl", "parquet", "csv"] = Field(
        default="auto",
        description="File format; `auto` checks the first bytes, and the name for CSV",
    )
    revision: str | None = Field(
        default=None,
        description="Hub only: branch, tag or commit. The commit that it resolves to is recorded",
    )
    subsets: tuple[str, ...] = Field(
        default=(), description="Hub only: configurations of the data set, read one after another"
    )
    split: str = Field(default="train", description="Hub only: split of the data set to read")
    streaming: bool = Field(
        default=False,
        description=(
            "Hub only: read rows over the network as they are needed, instead of downloading the "
            "data set first; with `max_conversations`, the rest is never read"
        ),
    )
    question: tuple[str, ...] = Field(
        default=(),
        description=(
            "Columns that form the question, joined by line breaks; if empty, chat records and the "
            "usual names (instruction + input, prompt, question, problem, ...) are recognised"
        ),
    )
    answer: tuple[str, ...] = Field(
        default=(), description="Columns that form the answer; required if `question` is given"
    )
    rendered_text: str | None = Field(
        default=None,
        description=(
            "Column with text that the target's chat template already rendered, instead of turns; "
            "a text that its turns do not render to exactly is dropped"
        ),
    )
    roles: dict[str, Role] = Field(
        default={},
        description=(
            "Names of roles that are not known, such as `narrator: assistant`; capitals do not "
            "count. They take precedence over the known names"
        ),
    )
    join_turns: bool = Field(
        default=False,
        description=(
            "Join consecutive turns of one role by an empty line; otherwise records that have "
            "them are dropped (`wrong_alternation`)"
        ),
    )
    accept_truncated: bool = Field(
        default=False,
        description="Use the whole records of a truncated file; the ledger records the loss",
    )
    accept_damaged: bool = Field(
        default=False,
        description="Drop records that are not JSON or not UTF-8; the ledger records them",
    )
    max_record_bytes: int = Field(
        default=16 << 20,
        gt=0,
        description="JSON only: drop larger records (bytes); the ledger records them",
    )
    max_conversations: int | None = Field(
        default=None, gt=0, description="Stop after this many kept conversations; empty means all"
    )
    weight: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description=(
            "Share of the conversations to take, selected by their content: more data, or another "
            "source, never changes which of the others are taken"
        ),
    )
    keep_pieces_together: bool = Field(
        default=False,
        description=(
            "Put conversations with ids X_0, X_1, ... into the same split: they are pieces of one "
            "chat, and evaluating on one after training on another overrates the draft. Chats "
            "that share a first question stay together, too"
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, fields: object) -> object:
        if not isinstance(fields, Mapping):
            return fields
        source = str(fields.get("source"))
        if not source.startswith("preset:"):
            return fields
        name = source.removeprefix("preset:")
        if name not in PRESETS:
            known = ", ".join(sorted(PRESETS))
            raise ValueError(f"there is no data set preset {name}; use one of {known}")
        preset = PRESETS[name]
        # A form sends every field: the preset replaces a field that still has its default.
        chosen = {
            key: value
            for key, value in fields.items()
            if key not in preset or value not in (None, [], (), cls.model_fields[key].default)
        }
        return {**preset, **chosen, "source": preset["source"]}

    @model_validator(mode="after")
    def _question_with_answer(self) -> Self:
        if bool(self.question) != bool(self.answer):
            raise ValueError("`question` and `answer` belong together: give both or neither")
        if self.rendered_text and self.question:
            raise ValueError("give `rendered_text`, or `question` and `answer`, not both")
        return self

    @property
    def columns(self) -> Columns | None:
        """The columns of question and answer, if configured."""
        return Columns(question=self.question, answer=self.answer) if self.question else None


class DatasetConfig(SourceConfig):
    """A data set: where its conversations come from and which are kept."""

    source: Address = Field(default="", description=f"{_SOURCE}. Give this or `sources`")
    sources: tuple[SourceConfig, ...] = Field(
        default=(),
        description=(
            "Several sources, instead of `source`: each has a name and its own keys from `source` "
            "to `keep_pieces_together`. A conversation that two of them have is counted for the "
            "first"
        ),
    )
    held_out_fraction: float = Field(
        default=0.05,
        ge=0.0,
        lt=1.0,
        description=(
            "Fraction of questions held out for evaluation: conversations with one first question "
            "are all held out, or none"
        ),
    )
    max_length: int = Field(
        default=2048, gt=1, description="Truncate tokenised conversations to this many tokens"
    )
    min_supervised_tokens: int = Field(
        default=1,
        gt=0,
        description="Drop tokenised conversations with fewer assistant tokens than this",
    )
    tokenize_processes: int | None = Field(
        default=None,
        gt=0,
        description="Tokenising processes, about 0.5 GB each; empty means one per 4,000 "
        "conversations, at most one per processor",
    )

    @model_validator(mode="after")
    def _one_or_several_sources(self) -> Self:
        if bool(self.source) == bool(self.sources):
            raise ValueError("give `source`, or `sources` for several, not both and not neither")
        if not self.sources:
            return self
        of_one = sorted(SourceConfig.model_fields.keys() - {"name"})
        given = [key for key in of_one if getattr(self, key) != self._default(key)]
        if given:
            raise ValueError(f"with `sources`, give {', '.join(given)} to each of them")
        names = [part.name for part in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"two of `sources` have one name: {', '.join(names)}")
        if any(part.source == REGENERATED for part in self.sources):
            raise ValueError(f"`{REGENERATED}` is a whole data set and cannot be one of `sources`")
        return self

    @property
    def parts(self) -> tuple["DatasetConfig", ...]:
        """This data set for each of its sources alone, by the names of the sources."""
        if not self.sources:
            return (self,)
        return tuple(
            self.model_copy(
                update={
                    "sources": (),
                    **{key: getattr(part, key) for key in type(part).model_fields},
                }
            )
            for part in self.sources
        )

    @property
    def origin(self) -> str:
        """Where the conversations come from, for messages."""
        return self.source or ", ".join(part.source for part in self.sources)

    def identity(self) -> dict[str, object]:
        """Return the fields that determine which conversations the data set contains."""
        later = {"name", "streaming", "max_length", "min_supervised_tokens", "tokenize_processes"}
        # Data sets that were built before these keys existed stay what they are.
        later |= {key for key in ("sources", "weight") if getattr(self, key) == self._default(key)}
        fields = self.model_dump(mode="json", exclude=later)
        for part in fields.get("sources", ()):
            del part["streaming"]
        return fields

    @classmethod
    def _default(cls, key: str) -> object:
        return cls.model_fields[key].default
