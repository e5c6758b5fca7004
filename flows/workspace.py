"""The layout of one home folder. Pure: computes paths, touches no files."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, TypeAdapter, ValidationError

from eagle_core.atomic_files import FOLDER_NAME
from eagle_core.errors import ConfigError

if TYPE_CHECKING:  # else commands that need no Arrow would import it
    from eagle_core.data.writer import Split

DEFAULT_HOME = "eyas-data"

RunName = Annotated[
    str,
    Field(
        pattern=FOLDER_NAME,
        description="Name of the training run: its folder is runs/TARGET-DATASET-RUN.",
    ),
]


def require_run_name(name: str) -> str:
    """Return a run's name unchanged; ConfigError unless it can name a folder."""
    try:
        return TypeAdapter[str](RunName).validate_python(name)
    except ValidationError as error:
        raise ConfigError(
            f"{name!r} cannot be the name of a run: use letters, digits, `.`, `_` and `-`, and "
            "start with a letter or digit"
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """The folders of one target model on one data set."""

    home: Path
    target: str
    dataset: str

    @classmethod
    def at(cls, home: str, *, target: str, dataset: str) -> Self:
        """Return the folders below `home`, in which `~` is expanded as in a shell."""
        return cls(home=Path(home).expanduser(), target=target, dataset=dataset)

    @property
    def dataset_path(self) -> Path:
        """Normalised conversations with manifest and ledger."""
        return self.home / "datasets" / self.dataset

    @property
    def tokens_path(self) -> Path:
        """Tokenised samples, one file per split and content of data set, tokenizer and template."""
        return self.home / "tokens" / f"{self.target}-{self.dataset}"

    def token_file(self, split: "Split", content: str) -> Path:
        """Tokenised samples of a split; `content` digests everything that determines them."""
        return self.tokens_path / f"{split}-{content}.arrow"

    def snapshot_name(self, split: "Split") -> str:
        """Name in a store of the current snapshot of a split."""
        return f"{self.dataset}-{split}"

    @property
    def store_root(self) -> Path:
        """Default root of the hidden-state store."""
        return self.home / "stores" / f"{self.target}-{self.dataset}"

    @property
    def import_path(self) -> Path:
        """What was imported as this data set: rows, ledger and recipe."""
        return self.home / "imports" / f"{self.target}-{self.dataset}"

    @property
    def object_cache_path(self) -> Path:
        """Copies of a remote store's objects; may be deleted at any time."""
        return self.home / "cache" / "objects"

    def run_path(self, run_name: str) -> Path:
        """Checkpoints, TensorBoard events and evaluation of one training run."""
        return self.home / "runs" / f"{self.target}-{self.dataset}-{run_name}"
