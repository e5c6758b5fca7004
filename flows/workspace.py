"""Where everything lies below one home folder. Pure: computes paths, touches nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

DEFAULT_HOME = "eyas-data"


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """The folders of one target model on one data set."""

    home: Path
    target: str
    dataset: str

    @classmethod
    def at(cls, home: str, *, target: str, dataset: str) -> Self:
        """Return the folders below `home`, in which `~` is the user's own as it is in a shell."""
        return cls(home=Path(home).expanduser(), target=target, dataset=dataset)

    @property
    def dataset_path(self) -> Path:
        """Normalised conversations with manifest and ledger."""
        return self.home / "datasets" / self.dataset

    @property
    def tokens_path(self) -> Path:
        """Tokenised samples, a file per split and content of data set, tokenizer and template."""
        return self.home / "tokens" / f"{self.target}-{self.dataset}"

    @property
    def store_root(self) -> Path:
        """Default root of the hidden-state store."""
        return self.home / "stores" / f"{self.target}-{self.dataset}"

    @property
    def object_cache_path(self) -> Path:
        """Copies of a remote store's objects; may be deleted at any time."""
        return self.home / "cache" / "objects"

    def run_path(self, run_name: str) -> Path:
        """Checkpoints, TensorBoard events and evaluation of one training run."""
        return self.home / "runs" / f"{self.target}-{self.dataset}-{run_name}"
