"""`run.json`: what a run was made with, written once, at its first step.

Whatever comes later (going on, estimate, evaluation, export) reads it, and no data set again.
"""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from eagle_core import checkpoint, weights
from eagle_core.checkpoint import require_identity
from eagle_core.dataset_config import DatasetConfig
from eagle_core.draft import DraftConfig
from eagle_core.draft_vocabulary import DraftVocabulary
from eagle_core.errors import ConfigError, CorruptError
from eagle_core.files import write_text
from eagle_core.hosted_trackers import TrackingConfig
from eagle_core.target import fingerprint_fields, read_stop_ids
from eagle_core.target_config import TargetConfig
from eagle_core.training_config import TrainingConfig
from flows.config import StoreConfig
from flows.draft_setup import VOCABULARY_NAME, DraftSetup
from flows.summaries import TokensSummary
from flows.target_tokenizer import conversation_tokenizer

RUN_NAME = "run.json"
FORMAT_VERSION = 1
_HOW_STATES_ARE_MADE = frozenset({"dtype", "attention", "capture_version"})
"""Fields of a target that matter to its states; a draft serves it with others as well."""


class Run(BaseModel):
    """Everything that a run was made with."""

    model_config = ConfigDict(frozen=True)  # what a newer Eyas adds is passed over

    format_version: int = FORMAT_VERSION
    title: str
    source_id: str
    """The snapshot that it learns from, or `online-` and a digest of what the target computed."""
    store_root: str | None
    """None for a run that stores nothing."""
    tokens: str
    """Content of its token files, as `Workspace.token_file` wants it."""
    tokenizer_fingerprint: str
    template_fingerprint: str
    target_fields: dict[str, str]
    """`eagle_core.target.fingerprint_fields`."""
    stop_ids: tuple[int, ...]
    """Token ids that end an answer."""
    draft: DraftConfig
    draft_vocabulary: str
    """Fingerprint of `draft_vocabulary.safetensors`."""
    vocabulary_coverage: float
    """Share of the supervised training tokens that the draft can propose, 0 to 1."""
    target: TargetConfig
    dataset: DatasetConfig
    store: StoreConfig
    training: TrainingConfig
    tracking: TrackingConfig

    @classmethod
    def of(
        cls,
        target: TargetConfig,
        dataset: DatasetConfig,
        store: StoreConfig,
        training: TrainingConfig,
        tracking: TrackingConfig,
        *,
        title: str,
        source_id: str,
        store_root: str | None,
        tokens: TokensSummary,
        setup: DraftSetup,
        vocabulary_coverage: float,
    ) -> Self:
        """Return the record of a run that is about to begin."""
        folder = weights.locate(target)
        return cls(
            title=title,
            source_id=source_id,
            store_root=store_root,
            tokens=tokens.content,
            tokenizer_fingerprint=tokens.tokenizer_fingerprint,
            template_fingerprint=tokens.template_fingerprint,
            target_fields=fingerprint_fields(target, folder),
            stop_ids=tuple(sorted(read_stop_ids(target, folder))),
            draft=setup.draft.config,
            draft_vocabulary=DraftVocabulary.load(setup.run_path / VOCABULARY_NAME).fingerprint,
            vocabulary_coverage=vocabulary_coverage,
            target=target,
            dataset=dataset,
            store=store,
            training=training,
            tracking=tracking,
        )

    def require_target(self, target: TargetConfig, run_path: Path) -> None:
        """Raise MismatchError naming what differs unless `target` is what the run learns from.

        Device, arithmetic and attention kernel may be others: a draft serves a target with any.
        """
        tokenizer = conversation_tokenizer(target)
        fields = fingerprint_fields(target, weights.locate(target))
        own = {"tokenizer": self.tokenizer_fingerprint, "template": self.template_fingerprint}
        now = {
            "tokenizer": tokenizer.tokenizer_fingerprint,
            "template": tokenizer.template_fingerprint,
        }
        for name in fields.keys() - _HOW_STATES_ARE_MADE:
            own[f"target.{name}"] = self.target_fields.get(name, "")
            now[f"target.{name}"] = fields[name]
        require_identity(run_path / RUN_NAME, own, now)


def read_run(run_path: Path) -> Run | None:
    """Return the record of a run, None where there is none.

    Raises:
        CorruptError: it is damaged.

    """
    path = run_path / RUN_NAME
    try:
        return Run.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CorruptError(
            f"{path} is damaged ({'.'.join(map(str, first['loc'])) or 'all of it'}: "
            f"{first['msg']}); restore it, or delete it: it is then made again from the recipe"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def write_run(run_path: Path, run: Run) -> None:
    """Write the record of a run, unless it stands already and a checkpoint depends on it."""
    if (run_path / RUN_NAME).exists() and checkpoint.newest(run_path) is not None:
        return
    write_text(run_path / RUN_NAME, run.model_dump_json(indent=2) + "\n")


def own_tokens(run_path: Path) -> str | None:
    """Return the content of the token files that a run learns from; None before a checkpoint.

    A run of a version that wrote no `run.json` says it by its draft vocabulary.
    """
    if checkpoint.newest(run_path) is None:
        return None
    run = read_run(run_path)
    if run is not None:
        return run.tokens
    return DraftVocabulary.load(run_path / VOCABULARY_NAME).source_id.removeprefix("train-")
