"""`run.json`: the record of a run's settings and data, written at its first step.

Later stages (resuming, estimate, evaluation, export) read it instead of the data set. Later
attempts change only `training`, `store` and `tracking`, as far as a run may change these.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eagle_core.atomic_files import write_text
from eagle_core.data.config import DatasetConfig
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.settings import PLAIN_DRAFT, DraftSettings
from eagle_core.draft.vocabulary import Coverage, DraftVocabulary, SourceCoverage
from eagle_core.errors import ConfigError, CorruptError, MismatchError
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.fingerprint import fields_of_draft, fingerprint_fields
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tracking.config import TrackingConfig
from eagle_core.training import checkpoint
from eagle_core.training.checkpoint import require_identity
from eagle_core.training.config import TrainingConfig
from eagle_core.training.loader import LoaderState
from eagle_core.training.schedule import Decay
from flows.bridge.draft_setup import VOCABULARY_NAME, DraftSetup
from flows.config.run import RunConfig
from flows.config.store import StoreConfig
from flows.summaries import TokensSummary

RUN_NAME = "run.json"
FORMAT_VERSION = 1


class Run(BaseModel):
    """The settings and data of a run."""

    model_config = ConfigDict(frozen=True)  # fields of a newer Eyas are ignored

    format_version: int = FORMAT_VERSION
    title: str
    source_id: str
    """The snapshot that it trains on, or `online-` and a digest of the target and its samples."""
    store_root: str | None
    """None for a run that stores nothing."""
    tokens: str
    """Content digest of its token files, an argument of `Workspace.token_file`."""
    tokenizer_fingerprint: str
    template_fingerprint: str
    target_fields: dict[str, str]
    """`eagle_core.target.fingerprint.fingerprint_fields`."""
    stop_ids: tuple[int, ...]
    """Token ids that end an answer."""
    draft: DraftConfig
    draft_settings: DraftSettings | None = None
    """None in files of older versions: `settings_of_draft`."""
    draft_vocabulary: str
    """Fingerprint of `draft_vocabulary.safetensors`."""
    vocabulary_coverage: float
    """Share of the supervised training tokens that the draft can propose, 0 to 1."""
    coverage_by_source: dict[str, SourceCoverage] = Field(default_factory=dict)
    """Empty for a data set of one source, and in files of older versions."""
    target: TargetConfig
    dataset: DatasetConfig
    store: StoreConfig
    training: TrainingConfig
    tracking: TrackingConfig

    @classmethod
    def of(
        cls,
        config: RunConfig,
        *,
        title: str,
        source_id: str,
        store_root: str | None,
        tokens: TokensSummary,
        setup: DraftSetup,
        coverage: Coverage,
    ) -> Self:
        """Return the record of a run that is about to start."""
        folder = weights.locate(config.target)
        return cls(
            title=title,
            source_id=source_id,
            store_root=store_root,
            tokens=tokens.content,
            tokenizer_fingerprint=tokens.tokenizer_fingerprint,
            template_fingerprint=tokens.template_fingerprint,
            target_fields=fingerprint_fields(config.target, folder),
            stop_ids=tuple(sorted(conversation_tokenizer(config.target).stop_ids)),
            draft=setup.draft.config,
            draft_settings=config.draft,
            draft_vocabulary=DraftVocabulary.load(setup.run_path / VOCABULARY_NAME).fingerprint,
            vocabulary_coverage=coverage.share,
            coverage_by_source=dict(coverage.by_source),
            target=config.given_target or config.target,
            dataset=config.dataset,
            store=config.store,
            training=config.training,
            tracking=config.tracking,
        )

    @property
    def coverage(self) -> Coverage:
        """How much of the supervised training tokens the draft can propose."""
        return Coverage(share=self.vocabulary_coverage, by_source=self.coverage_by_source)

    @property
    def settings_of_draft(self) -> DraftSettings:
        """The settings of the run's draft."""
        return self.draft_settings or PLAIN_DRAFT.with_moved(self.training.moved)

    def require_vocabulary(self, run_path: Path) -> None:
        """Raise MismatchError unless the run's folder has the draft vocabulary it started with."""
        found = DraftVocabulary.load(run_path / VOCABULARY_NAME).fingerprint
        if found != self.draft_vocabulary:
            raise MismatchError(
                f"{run_path / VOCABULARY_NAME} is not the draft vocabulary that the run started "
                f"with ({found[:12]}, {self.draft_vocabulary[:12]} in {RUN_NAME}); restore it, or "
                "delete it: resuming the run (eyas run train) rebuilds it"
            )

    def require_target(self, target: TargetConfig, run_path: Path) -> None:
        """Raise MismatchError, naming the fields, unless `target` is the target of the run.

        Device, arithmetic, kernels and backend may differ: a draft serves a target with any.
        """
        tokenizer = conversation_tokenizer(target)
        fields = fields_of_draft(target, weights.locate(target))
        own = {"tokenizer": self.tokenizer_fingerprint, "template": self.template_fingerprint}
        now = {
            "tokenizer": tokenizer.tokenizer_fingerprint,
            "template": tokenizer.template_fingerprint,
        }
        for name, value in fields.items():
            own[f"target.{name}"] = self.target_fields.get(name, "")
            now[f"target.{name}"] = value
        require_identity(run_path / RUN_NAME, own, now)


def read_run(run_path: Path) -> Run | None:
    """Return the record of a run, or None without one.

    Raises:
        CorruptError: it is damaged.

    """
    path = run_path / RUN_NAME
    try:
        run = Run.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CorruptError(
            f"{path} is damaged, or from a newer version of Eyas "
            f"({'.'.join(map(str, first['loc'])) or 'whole file'}: {first['msg']}); restore it, or "
            "delete it: it is then rebuilt from the recipe"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if run.format_version > FORMAT_VERSION:
        raise ConfigError(
            f"{path} has version {run.format_version}, but this version of Eyas reads up to "
            f"{FORMAT_VERSION}; use the newer one that wrote it"
        )
    return run


def write_run(run_path: Path, run: Run, *, begun: Run | None) -> None:
    """Write the record of a run; if it had `begun`, update only what attempts may change."""
    if begun is not None:
        changed = {name: getattr(run, name) for name in ("training", "store", "tracking")}
        # Older versions recorded flags of the draft in `training`, which no longer holds them.
        changed["draft_settings"] = begun.settings_of_draft
        run = begun.model_copy(update=changed)
    write_text(run_path / RUN_NAME, run.model_dump_json(indent=2) + "\n")


def own_tokens(run_path: Path, run: Run | None) -> str | None:
    """Return the content digest of a run's token files, if its folder records it.

    For a run of an older version, without `run.json`, the draft vocabulary records it.
    """
    if run is not None:
        return run.tokens
    path = run_path / VOCABULARY_NAME
    if not path.exists():  # rebuilt from the data set; the checkpoint shows if it matches
        return None
    return DraftVocabulary.load(path).source_id.removeprefix("train-")


@dataclass(frozen=True, kw_only=True, slots=True)
class BegunRun:
    """The state of a run with a checkpoint, read once: its files may be gigabytes."""

    step: int
    loader: LoaderState
    decay: Decay | None
    """Of its learning rate; None in checkpoints of earlier versions."""
    tokens: str
    """Content digest of its token files."""
    record: Run | None
    """None for a run of an older version, without `run.json`."""

    @property
    def source_id(self) -> str:
        """Return the id of the samples that it trains on."""
        return self.loader.source_id


def begun_run(run_path: Path) -> BegunRun | None:
    """Return the state of a run; None before its first checkpoint."""
    folder = checkpoint.newest(run_path)
    if folder is None:
        return None
    record, found = read_run(run_path), checkpoint.read(folder)
    tokens = own_tokens(run_path, record)
    if tokens is None:
        return None
    return BegunRun(
        step=found.step, loader=found.loader, decay=found.decay, tokens=tokens, record=record
    )
