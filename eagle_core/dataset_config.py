"""What the user says about a data set."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DatasetConfig(BaseModel):
    """A data set: where its conversations come from and what is kept of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        description="Short name; names the output and appears in reports",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
    )
    source: str = Field(
        description=(
            "Where the records are: a path, a glob, any fsspec URL (s3://, https://, ...), "
            "`package:NAME` for the data file of an installed Python package (`package:NAME/PATH` "
            "if it has several), or `hf:ORG/NAME` for a data set of the Hugging Face hub"
        )
    )
    format: Literal["auto", "json", "jsonl", "parquet"] = Field(
        default="auto",
        description="Form of the files; `auto` looks at the name, then at the first character",
    )
    revision: str | None = Field(
        default=None,
        description="Hub only: branch, tag or commit. The commit it stands for is recorded",
    )
    subset: str | None = Field(default=None, description="Hub only: configuration of the data set")
    split: str = Field(default="train", description="Hub only: split of the data set to read")
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
    max_length: int = Field(
        default=2048, gt=1, description="Cut a tokenised conversation here (tokens)"
    )
    min_supervised_tokens: int = Field(
        default=1,
        gt=0,
        description="Leave out a tokenised conversation with fewer assistant tokens than this",
    )

    def identity(self) -> dict[str, object]:
        """Return the fields that decide which conversations the data set holds."""
        return self.model_dump(exclude={"name", "max_length", "min_supervised_tokens"})
