"""Configuration of a data set."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from eagle_core.address import Address
from eagle_core.atomic_files import FOLDER_NAME
from eagle_core.config_model import ConfigModel
from eagle_core.data.columns import Columns
from eagle_core.data.presets import PRESETS

REGENERATED = "regenerated"
"""The source of a data set whose answers the target generated."""


class DatasetConfig(ConfigModel):
    """A data set: where its conversations come from and which are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(
        description="Short name; used for the output and in reports",
        pattern=FOLDER_NAME,
    )
    source: Address = Field(
        description=(
            "Source of the records: a path, a glob, any fsspec URL (s3://, https://, ...), "
            "`package:NAME` for the data file of an installed Python package (`package:NAME/PATH` "
            "if it has several), `hf:ORG/NAME` for a data set on the Hugging Face hub, "
            "`hf://datasets/ORG/NAME/PATH` for some of its files, "
            f"`preset:NAME` with one of {', '.join(sorted(PRESETS))}, or `{REGENERATED}` for the "
            "data set of this name that the flow `regenerate` built; it is used unchanged"
        )
    )
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
        description="Drop larger records (bytes); the ledger records them",
    )
    max_conversations: int | None = Field(
        default=None, gt=0, description="Stop after this many kept conversations; empty means all"
    )
    held_out_fraction: float = Field(
        default=0.05,
        ge=0.0,
        lt=1.0,
        description="Fraction of conversations held out for evaluation, selected by their content",
    )
    keep_pieces_together: bool = Field(
        default=False,
        description=(
            "Put conversations with ids X_0, X_1, ... into the same split: they are pieces of one "
            "chat, and evaluating on one after training on another overrates the draft"
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

    def identity(self) -> dict[str, object]:
        """Return the fields that determine which conversations the data set contains."""
        later = {"name", "streaming", "max_length", "min_supervised_tokens", "tokenize_processes"}
        return self.model_dump(mode="json", exclude=later)
