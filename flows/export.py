"""`export`: writes the draft of a run in every layout that serving engines load."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.draft.export import ServedTarget
from eagle_core.draft.export import export as write_layouts
from eagle_core.draft.export_config import ExportLayout
from eagle_core.draft.model import DraftModel
from eagle_core.draft.readers import OF_SERVING, Reader, lacking
from eagle_core.serving.llamacpp.draft_file import export_gguf
from eagle_core.target.config import TargetConfig
from eagle_core.target.weights import locate
from eagle_core.training.config import TrainingConfig
from eagle_core.training.decoded_points import decoded_lengths
from flows.config.export import RunExportConfig
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.run_name import run_name
from flows.orchestration.stage_report import report_stage
from flows.reports.export_rows import export_rows
from flows.summaries import ExportedLayout, ExportSummary
from flows.tasks.served_draft import served_target
from flows.tasks.trained_run import TrainedRun, open_run
from flows.workspace import DEFAULT_HOME, RunName

FOLDER_NAME = "export"


@flow(
    name="export",
    flow_run_name=run_name("export-{target.name}-{dataset.name}-{run}"),
    persist_result=False,
)
def export_flow(
    target: TargetConfig,
    dataset: DatasetConfig,
    training: TrainingConfig = TrainingConfig(),
    export: RunExportConfig = RunExportConfig(),
    home: str = DEFAULT_HOME,
    run: RunName = "main",
) -> ExportSummary:
    """Write the draft of run `run` in the layouts of engines.

    Each layout is a folder below the run's folder, which appears atomically; another export
    replaces it. `dataset` and `training` are used as in `evaluate`.

    Raises:
        ConfigError: the run has no checkpoint, a folder holds files that no export wrote,
            llama.cpp's converter is not installed, or a layout cannot represent the draft.
        MismatchError: the run was trained for another target, tokenizer or template.

    """
    started = time.monotonic()
    trained = open_run(target, dataset, training, home, run, export.checkpoint)
    run_path = trained.path
    setup, found = trained.load_draft()
    served = served_target(target)
    written = _write(setup.draft, served, run_path / FOLDER_NAME, export, target)
    summary = ExportSummary(
        run_path=run_path,
        checkpoint_step=found.step,
        held_out_length=_held_out_length(found.figures, found.step),
        decoded_length=_decoded_length(trained, found.step),
        served_model=export.verifier or served.name_or_path,
        revision=target.revision if served.name_or_path == target.model else None,
        speculative_tokens=export.speculative_tokens,
        layouts=tuple(
            ExportedLayout(
                layout=layout,
                path=path,
                num_bytes=_size(path),
                lacking=_lacking(layout, setup.draft),
            )
            for layout, path in written.items()
        ),
        seconds=time.monotonic() - started,
    )
    rows = export_rows(summary)
    title = f"Export: {target.name} on {dataset.name}, run {run}"
    report_stage(title, rows, key=artifact_key("export", target.name, dataset.name, run))
    return summary


def _write(
    draft: DraftModel,
    served: ServedTarget,
    folder: Path,
    config: RunExportConfig,
    target: TargetConfig,
) -> dict[ExportLayout, Path]:
    """Write the layouts in the order in which they are asked for, the strictest first."""
    written: dict[ExportLayout, Path] = {}
    if "gguf" in config.layouts:
        written["gguf"] = export_gguf(
            draft,
            served,
            folder,
            config,
            weights=locate(target),
            trust_remote_code=target.trust_remote_code,
        )
    written.update(write_layouts(draft, served, folder, config).items())
    return {layout: written[layout] for layout in config.layouts}


def _lacking(layout: ExportLayout, draft: DraftModel) -> dict[Reader, tuple[str, ...]]:
    """Return the engines that load a layout but lack variants of the draft, and which."""
    readers = OF_SERVING if layout == "serving" else ()
    found = {reader: lacking(reader, draft.config) for reader in readers}
    return {reader: variants for reader, variants in found.items() if variants}


def _held_out_length(figures: Mapping[str, Any], step: int) -> float | None:
    """Return the acceptance length measured at this step, if there is one."""
    return float(figures["held_out_length"]) if figures.get("held_out_step") == step else None


def _decoded_length(trained: TrainedRun, step: int) -> float | None:
    """Return the decoded acceptance length of this step, if that chooses the best checkpoint."""
    if trained.training.best_by != "decoding":
        return None
    return decoded_lengths(trained.path).get(step)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
