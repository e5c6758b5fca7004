"""The result of each flow: plain figures, ready for a table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from eagle_core.data.config import DatasetConfig
from eagle_core.data.ledger import Reason
from eagle_core.data.manifest import SourceCounts
from eagle_core.diagnosis.finding import Finding
from eagle_core.draft.export_config import ExportLayout
from eagle_core.draft.readers import Reader
from eagle_core.draft.vocabulary import SourceCoverage
from eagle_core.evaluation.acceptance import AcceptanceReport
from eagle_core.evaluation.benchmarks.report import SweepReport
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.engine_report import EngineReport
from eagle_core.evaluation.estimate import AcceptanceEstimate
from eagle_core.training.decoded_points import DecodedPoint
from eagle_core.training.result import Best, Metrics, Start


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSummary:
    """The data set that `dataset` built from the source."""

    path: Path
    fingerprint: str
    num_records: int
    num_train: int
    num_held_out: int
    dropped: Mapping[str, int]
    """Records by reason."""
    changed: Mapping[str, int]
    """Records that were kept with a change, by change."""
    unread: Mapping[str, int]
    """Records that were kept, by the name of a field that nothing reads."""
    ledger_path: Path
    """Lists all of these with their locations."""
    seconds: float
    by_source: Mapping[str, SourceCounts] = field(default_factory=dict)
    """By the names of `dataset.sources`."""

    @property
    def num_dropped(self) -> int:
        """Dropped records, for any reason."""
        return sum(self.dropped.values())

    @property
    def dropped_share(self) -> float:
        """Dropped records per record read, 0 to 1, without those that a weight leaves out."""
        left_out = self.dropped.get(Reason.NOT_SELECTED, 0)
        return (self.num_dropped - left_out) / max(self.num_records - left_out, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensSummary:
    """The tokenised data set."""

    content: str
    """A digest of everything that determines the token files; part of their names."""
    train_path: Path
    held_out_path: Path
    tokenizer_fingerprint: str
    template_fingerprint: str
    num_samples: int
    num_tokens: int
    num_supervised_tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenStatesSummary:
    """What `hidden-states` added to the store, and what the store now holds."""

    store_root: str
    snapshot_id: str
    profile: str
    num_samples: int
    num_tokens: int
    num_supervised_tokens: int
    num_excluded: int
    """Samples of the data set that the store excludes."""
    num_shards: int
    shards_made: int
    raw_bytes: int
    stored_bytes: int
    seconds: float

    @property
    def stored_bytes_per_token(self) -> float:
        """Bytes on disk per token."""
        return self.stored_bytes / max(self.num_tokens, 1)

    @property
    def raw_bytes_per_token(self) -> float:
        """Bytes of the raw arrays per token."""
        return self.raw_bytes / max(self.num_tokens, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportSummary:
    """What `import-store` took from a dump of another tool, and what it did not."""

    states: HiddenStatesSummary
    """What the store now holds."""
    dataset: DatasetConfig
    """The data set that training reads."""
    num_rows: int
    num_imported: int
    num_before: int
    """Rows that an earlier import had brought."""
    dropped: Mapping[str, int]
    """Rows by reason."""
    changed: Mapping[str, int]
    """Rows that were taken with a change, by change."""
    ledger_path: Path
    num_checked: int
    """Rows that were compared with the target's own states."""
    largest_error: float
    """Of the states of these rows, relative to the target's; rows that do not agree are dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSummary:
    """The result of training."""

    run_path: Path
    source_id: str
    num_steps: int
    figures: Metrics
    vocabulary_coverage: float
    tokens_per_second: float
    dtype: str
    """Dtype of matrix products."""
    seconds: float
    coverage_by_source: Mapping[str, SourceCoverage] = field(default_factory=dict)
    """Of the draft vocabulary; empty unless the data set has several sources."""
    start: Start | None = None
    """None for a run of an earlier version."""
    best: Best | None = None
    """None if no checkpoint was measured, and for a run of an earlier version."""
    decoded: DecodedPoint | None = None
    """What was decoded last while it trained; None if nothing was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSummary:
    """Acceptance by real speculative decoding, before and after training."""

    evaluation: EvaluationConfig
    checkpoint_step: int
    untrained: AcceptanceReport | None
    """None if an engine decoded, which gets only the trained draft."""
    trained: AcceptanceReport
    trained_by_group: dict[str, AcceptanceReport]
    """By turn or by category; empty if all prompts are in one group."""
    estimate: AcceptanceEstimate | None
    """Estimate from stored states for the same checkpoint; None if there is none."""
    seconds: float
    engine: EngineReport | None = None
    """Speeds by draft length and concurrency; None if no engine decoded."""
    warning: str = ""
    """Why the figures are not to be relied on; empty if they are."""
    benchmarks: SweepReport | None = None
    """By benchmark set; None without any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateSummary:
    """Acceptance in serving, estimated from the stored states of the held-out split."""

    run_path: Path
    checkpoint_step: int
    snapshot_id: str
    """Snapshot of the held-out samples."""
    estimate: AcceptanceEstimate
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorSummary:
    """What lowers the acceptance of a run."""

    run_path: Path
    checkpoint_step: int
    findings: tuple[Finding, ...]
    """Of every check, most likely cause first."""
    seconds: float

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Findings that lower acceptance."""
        return tuple(finding for finding in self.findings if finding.state == "problem")


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineSummary:
    """The results of all stages of `offline`."""

    states: HiddenStatesSummary | None
    """None on a machine that only trained with the first one."""
    training: TrainSummary
    estimate: EstimateSummary | None
    """None if no samples are held out."""
    acceptance: EvaluateSummary | None
    """None if this machine cannot decode the target."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineSummary:
    """The results of all stages of `online`."""

    training: TrainSummary
    acceptance: EvaluateSummary | None
    """None if this machine cannot decode the target."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedLayout:
    """One folder that engines load."""

    layout: ExportLayout
    path: Path
    num_bytes: int
    lacking: Mapping[Reader, tuple[str, ...]] = field(default_factory=dict)
    """Engines that load this layout, but lack variants of the draft."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSummary:
    """Where an exported draft is, and the settings to serve it with."""

    run_path: Path
    checkpoint_step: int
    held_out_length: float | None
    """Acceptance length of the checkpoint on the held-out split; None if it was not measured."""
    decoded_length: float | None = None
    """Its length in real decoding, of a run whose best checkpoint is chosen by that."""
    served_model: str
    """The target as an engine loads it: a Hugging Face id, or a folder."""
    revision: str | None
    """Of a Hugging Face id, if one is pinned."""
    speculative_tokens: int
    layouts: tuple[ExportedLayout, ...]
    seconds: float
