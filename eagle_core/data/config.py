"""What the user says about a data set."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from eagle_core.address import Address
from eagle_core.atomic_files import FOLDER_NAME
from eagle_core.config_model import ConfigModel
from eagle_core.data.columns import Columns
from eagle_core.data.presets import PRESETS

REGENERATED = "regenerated"
"""The source of a data set whose answers are the target's own."""


class DatasetConfig(ConfigModel):
    """A data set: where its conversations come from and what is kept of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(
        description="Short name; names the output and appears in reports",
        pattern=FOLDER_NAME,
    )
    source: Address = Field(
        description=(
            "Where the records are: a path, a glob, any fsspec URL (s3://, https://, ...), "
            "`package:NAME` for the data file of an installed Python package (`package:NAME/PATH` "
            "if it has several), `hf:ORG/NAME` for a data set of the Hugging Face hub, "
            f"`preset:NAME` with one of {', '.join(sorted(PRESETS))}, or `{REGENERATED}` for the "
            "data set of this name that the flow `regenerate` made; it is taken as it is"
        )
    )
    format: Literal["auto", "json", "jsonl", "parquet", "csv"] = Field(
        default="auto",
        description="Form of the files; `auto` looks at the name, then at the first character",
    )
    revision: str | None = Field(
        default=None,
        description="Hub only: branch, tag or commit. The commit it stands for is recorded",
    )
    subsets: tuple[str, ...] = Field(
        default=(), description="Hub only: configurations of the data set, read one after another"
    )
    split: str = Field(default="train", description="Hub only: split of the data set to read")
    question: tuple[str, ...] = Field(
        default=(),
        description=(
            "Columns that are the question, joined by line breaks; empty recognises chat records "
            "and the usual names (instruction + input, prompt, question, problem, ...)"
        ),
    )
    answer: tuple[str, ...] = Field(
        default=(), description="Columns that are the answer; given exactly if `question` is"
    )
    rendered_text: str | None = Field(
        default=None,
        description=(
            "Column whose text the target's chat template has written already, instead of turns; "
            "a text that its turns, rendered again, do not give exactly is left out"
        ),
    )
    accept_truncated: bool = Field(
        default=False,
        description="Use the whole records of a file that was cut; the loss goes to the ledger",
    )
    accept_damaged: bool = Field(
        default=False,
        description="Leave out records that are not JSON or not UTF-8; they go to the ledger",
    )
    max_record_bytes: int = Field(
        default=16 << 20,
        gt=0,
        description="Leave out larger records (bytes); they go to the ledger",
    )
    max_conversations: int | None = Field(
        default=None, gt=0, description="Stop after this many kept conversations; empty means all"
    )
    held_out_fraction: float = Field(
        default=0.05,
        ge=0.0,
        lt=1.0,
        description="Share of conversations held out for evaluation, chosen by their content",
    )
    keep_pieces_together: bool = Field(
        default=False,
        description=(
            "Put conversations with ids X_0, X_1, ... into the same split: they are pieces of one "
            "chat, and evaluating on one after training on another flatters the draft"
        ),
    )
    max_length: int = Field(
        default=2048, gt=1, description="Cut a tokenised conversation here (tokens)"
    )
    min_supervised_tokens: int = Field(
        default=1,
        gt=0,
        description="Leave out a tokenised conversation with fewer assistant tokens than this",
    )
    tokenize_processes: int | None = Field(
        default=None,
        gt=0,
        description="Processes that tokenise, about 0.5 GB each; empty takes one for every 4,000 "
        "conversations, at most as many as there are processors",
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
            raise ValueError(f"there is no data set preset {name}; known are {known}")
        preset = PRESETS[name]
        # A form writes every field out: what is as if nobody had chosen it is the preset's.
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
        """The columns of question and answer, if they are named."""
        return Columns(question=self.question, answer=self.answer) if self.question else None

    def identity(self) -> dict[str, object]:
        """Return the fields that decide which conversations the data set holds."""
        later = {"name", "max_length", "min_supervised_tokens", "tokenize_processes"}
        return self.model_dump(mode="json", exclude=later)
