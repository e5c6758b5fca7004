"""What machines that train one run tell each other, to be sure that it is one run."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from eagle_core.draft.settings import PLAIN_DRAFT, DraftSettings
from eagle_core.errors import MismatchError
from eagle_core.target.config import TargetConfig
from eagle_core.training.config import TrainingConfig


class RunOfMachines(BaseModel):
    """What a run of several machines is, by the command of one of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    target: TargetConfig
    draft: DraftSettings = PLAIN_DRAFT
    training: TrainingConfig
    run_path: Path
    working_folder: Path | None = None
    """To which `run_path` is relative; None if it is absolute."""

    @classmethod
    def here(
        cls,
        title: str,
        target: TargetConfig,
        draft: DraftSettings,
        training: TrainingConfig,
        run_path: Path,
    ) -> "RunOfMachines":
        """Return the run as this process has it."""
        folder = None if run_path.is_absolute() else Path.cwd()
        return cls(
            title=title,
            target=target,
            draft=draft,
            training=training,
            run_path=run_path,
            working_folder=folder,
        )

    def require_same(self, first: "RunOfMachines") -> None:
        """Raise MismatchError, naming the settings, unless the first machine has the same run."""
        own, theirs = self.settings(), first.settings()
        differing = [
            f"{name} is {value!r} here and {theirs.get(name)!r} on the first machine"
            for name, value in own.items()
            if theirs.get(name) != value
        ]
        if differing:
            raise MismatchError(
                f"run {self.title}: {'; '.join(differing)}; run the same command on all machines"
            )

    def settings(self) -> dict[str, JsonValue]:
        """Return everything by name."""
        found: dict[str, JsonValue] = {
            "the run": self.title,
            "its folder": str(self.run_path),
            "the working folder": str(self.working_folder),
        }
        for section in ("target", "draft", "training"):
            fields = getattr(self, section).model_dump(mode="json")
            found |= {f"{section}.{name}": value for name, value in fields.items()}
        return found
