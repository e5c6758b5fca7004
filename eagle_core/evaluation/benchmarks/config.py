"""Settings of one benchmark set."""

from typing import Self, get_args

from pydantic import ConfigDict, Field, model_validator

from eagle_core.address import Address
from eagle_core.atomic_files import FOLDER_NAME
from eagle_core.config_model import ConfigModel
from eagle_core.evaluation.benchmarks.sets import BenchmarkName

KNOWN: tuple[BenchmarkName, ...] = get_args(BenchmarkName)


class BenchmarkConfig(ConfigModel):
    """A set of questions: a named one, or a file of your own."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(
        description=f"{', '.join(KNOWN)}, or another name for the questions at `path`.",
        pattern=FOLDER_NAME,
    )
    path: Address | None = Field(
        default=None,
        description="A file with the columns of this set, instead of the one on the hub. For "
        "another name, a file as for `prompts`, of which all `turns` are asked.",
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of the hub data set, instead of the pinned commit.",
    )

    @model_validator(mode="after")
    def _known_or_a_file(self) -> Self:
        if self.path is None and self.name not in KNOWN:
            raise ValueError(
                f"there is no benchmark {self.name}: give the `path` of its file, or use one of "
                f"{', '.join(KNOWN)}"
            )
        if self.path is not None and self.revision is not None:
            raise ValueError("`revision` is of the hub; a file at `path` has none: omit one")
        return self
