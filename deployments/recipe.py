"""A recipe: all settings of the flows for one target model, read from its YAML file."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deployments.automation import AutomationConfig
from eagle_core.data.config import DatasetConfig
from eagle_core.draft.settings import DraftSettings
from eagle_core.errors import ConfigError
from eagle_core.evaluation.bench import BenchConfig
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.target.config import TargetConfig
from eagle_core.tracking.config import TrackingConfig
from eagle_core.training.config import TrainingConfig
from flows.config.export import RunExportConfig
from flows.config.runner import RunnerConfig
from flows.config.store import StoreConfig

if TYPE_CHECKING:
    from flows.bridge.run import Run

FOLDER = Path(__file__).parent / "recipes"
FORMER_FOLDER = FOLDER.parent  # recipes were here before they had a folder
_log = logging.getLogger(__name__)


class Recipe(BaseModel):
    """One YAML file of `deployments/recipes/`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: TargetConfig
    dataset: DatasetConfig
    regeneration: RegenerationConfig = Field(default_factory=RegenerationConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    runner: RunnerConfig = Field(default_factory=RunnerConfig)
    draft: DraftSettings = Field(default_factory=DraftSettings)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    bench: BenchConfig = Field(default_factory=BenchConfig)
    export: RunExportConfig = Field(default_factory=RunExportConfig)
    automation: AutomationConfig = Field(default_factory=AutomationConfig)

    @model_validator(mode="after")
    def _move_to_draft(self) -> Self:
        """Let keys that older recipes have in `training` count where they are now."""
        draft = self.draft.with_moved(self.training.moved)
        object.__setattr__(self, "draft", draft)  # frozen from here on
        return self


def recipe_names() -> list[str]:
    """Return the names of the recipes in `deployments/recipes/`."""
    return sorted(_paths())


def _paths() -> dict[str, Path]:
    """Return each recipe's file by its name."""
    folders = (FORMER_FOLDER, FOLDER)
    return {path.stem: path for folder in folders for path in folder.glob("*.yaml")}


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe with overrides applied.

    Args:
        name: a name in `deployments/recipes/` such as smollm2, or a path that ends in .yaml.
        overrides: `section.key=value`, the value in YAML: `training.max_steps=100`.

    Raises:
        ConfigError: no such recipe, or unknown keys or invalid values; names each one.

    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _paths().get(name)
    if path is not None and path.resolve().parent == FORMER_FOLDER and not path.is_file():
        path = FOLDER / path.name
    if path is None or not path.is_file():
        raise ConfigError(
            f"there is no recipe {name!r}; known recipes: {', '.join(recipe_names())}. Name one of "
            "these, or give the path of a YAML file or the folder of a run"
        )
    if path.resolve().parent == FORMER_FOLDER:
        _log.warning("%s: recipes are in deployments/recipes/ now; move this one there", path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds no recipe: expected the sections {_sections()}")
    return _validated(document, overrides, str(path))


def recipe_of_run(run: "Run", run_path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a run, with overrides applied.

    Sections that a run does not record have their defaults.

    Raises:
        ConfigError: unknown keys or invalid values; names each one.

    """
    sections = ("target", "dataset", "store", "training", "tracking")
    document = {name: getattr(run, name).model_dump(mode="json") for name in sections}
    document["draft"] = run.settings_of_draft.model_dump(mode="json")
    return _validated(document, overrides, str(run_path))


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe as the text of its file, without the keys that have their default."""
    document = recipe.model_dump(mode="json", exclude_defaults=True)
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    return text


def _validated(document: dict[str, Any], overrides: Sequence[str], where: str) -> Recipe:
    for override in overrides:
        _apply(document, override)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise ConfigError(_explain(error, where)) from error


def _sections() -> str:
    return ", ".join(Recipe.model_fields)


def _apply(document: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in the document."""
    dotted, equals, text = override.partition("=")
    *parents, key = dotted.split(".")
    if not equals or not parents:
        raise ConfigError(f"--set {override}: expected section.key=value, sections: {_sections()}")
    node = document
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a section")
    node[key] = yaml.safe_load(text)


def _explain(error: ValidationError, where: str) -> str:
    """Return one message that names every wrong key, what was expected and what exists."""
    lines = [f"{where} is invalid:"]
    for problem in error.errors(include_url=False):
        dotted = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(_known_keys(problem["loc"]))
            lines.append(f"  {dotted}: there is no such key; known keys: {known}")
        elif problem["type"] == "secret":  # must not be shown
            lines.append(f"  {dotted}: {problem['msg']}")
        elif problem["type"] == "value_error" and isinstance(problem["input"], dict):
            lines.append(f"  {dotted}: {problem['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"  {dotted}: {problem['msg']} (found {problem['input']!r})")
    return "\n".join(lines)


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the known keys of the section that the last part of `location` is in."""
    model: type[BaseModel] = Recipe
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
