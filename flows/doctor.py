"""`doctor`: why is my acceptance so low? Checks a run, and names causes, most likely first."""

import dataclasses
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.diagnosis.diagnosis import RunFigures, diagnose
from eagle_core.diagnosis.draft_interface import LayerError, check_fit
from eagle_core.diagnosis.finding import Finding
from eagle_core.diagnosis.overfitting import (
    MOST_STEPS,
    NUM_TEXTS,
    TargetEnds,
    layer_errors,
    overfit_texts,
)
from eagle_core.errors import ConfigError, MismatchError
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.prompts import sample_prompts
from eagle_core.target.config import TargetConfig
from eagle_core.target.end_weights import load_ends
from eagle_core.target.placement import load_decoding_target, why_not_decoded
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.target.weights import locate
from flows.bridge.store_identity import as_in_store
from flows.bridge.stored_figures import StoredFigures
from flows.config.store import StoreConfig
from flows.errors import ProblemsFoundError
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.artifacts import publish_table
from flows.orchestration.credentials import store_root
from flows.orchestration.progress import stage_progress
from flows.orchestration.run_name import run_name
from flows.reports.findings import cause_rows, other_rows, verdict
from flows.reports.table import print_table
from flows.summaries import DoctorSummary
from flows.tasks.prepare import check_runnable, prepare_weights
from flows.tasks.run_figures import ExaminedRun, examined_run, run_figures
from flows.workspace import DEFAULT_HOME, RunName, Workspace

_MOST_PROMPT_TOKENS = 256
logger = logging.getLogger(__name__)


@flow(
    name="doctor",
    flow_run_name=run_name("doctor-{target.name}-{dataset.name}-{run}"),
    persist_result=False,
)
def doctor_flow(
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),
    evaluation: EvaluationConfig = EvaluationConfig(),
    home: str = DEFAULT_HOME,
    run: RunName = "main",
    export: str | None = None,
    overfit: bool = False,
) -> DoctorSummary:
    """Check run `run` for what lowers acceptance: data, template, layers, vocabulary, learning.

    Changes nothing. Settings of the run are read from its folder; `dataset` only names it. Of
    `evaluation` only `checkpoint` is used, and `draft_tokens` if the run was never evaluated.

    Args:
        target: as it is served: what differs from the run's target is a finding.
        dataset: names the run.
        store: the store that the run was trained on.
        evaluation: which checkpoint to look at.
        home: folder of data, stores and runs.
        run: name of the run.
        export: folder of the exported draft that is served; by default that of the run.
        overfit: also train a fresh draft on four texts of the target until it knows them, and
            decode them for real: more than 4.5 of 6 tokens per forward proves that training and
            decoding agree. Takes minutes, and a machine that can decode the target.

    Raises:
        ConfigError: there is no such run, it has no checkpoint, or `export` is no export.
        ProblemsFoundError: something lowers acceptance; the table lists it.

    """
    started = time.monotonic()
    space = Workspace.at(home, target=target.name, dataset=dataset.name)
    root = store_root(store, space)
    target = as_in_store(target, root)
    prepare_weights(target)
    named, key = f"{target.name} on {dataset.name}, run {run}", (target.name, dataset.name, run)
    try:
        examined = examined_run(target, space, run, evaluation)
    except MismatchError as error:
        findings: tuple[Finding, ...] = (check_fit(str(error)),)
        _show(findings, named, key)
        raise ProblemsFoundError(_problems(findings, run)) from error
    folder = None if export is None else Path(export).expanduser()
    with stage_progress("examining", key=artifact_key("doctor"), total=1, unit="run") as bar:
        figures, stored = run_figures(examined, root, evaluation, export=folder)
        bar.advance()
    if overfit:
        figures = _with_target(examined, figures, stored)
    findings = tuple(diagnose(figures))
    summary = DoctorSummary(
        run_path=examined.path,
        checkpoint_step=figures.step,
        findings=findings,
        seconds=time.monotonic() - started,
    )
    _show(findings, f"{named}, step {figures.step:,}", key)
    if summary.problems:
        raise ProblemsFoundError(_problems(findings, run))
    logger.info("run %s: %s", run, verdict(findings))
    return summary


def _show(findings: Sequence[Finding], title: str, key: Sequence[str]) -> None:
    """Print the findings, and publish them as an artifact."""
    causes, others = cause_rows(findings), other_rows(findings)
    if causes:
        print_table(f"Doctor: {title}", causes, is_ruled=True)
    if others:
        print_table("Other checks" if causes else f"Doctor: {title}", others)
    publish_table(f"Doctor: {title}", [*causes, *others], key=artifact_key("doctor", *key))


def _problems(findings: Sequence[Finding], run: str) -> str:
    return f"run {run}: {verdict(findings)}; see the table for what to do"


def _with_target(examined: ExaminedRun, figures: RunFigures, stored: StoredFigures) -> RunFigures:
    """Add what only the whole target shows: its own states, and a draft overfitted on purpose."""
    target = examined.target
    obstacle = why_not_decoded(target)
    if obstacle:
        return dataclasses.replace(figures, overfit=obstacle)
    check_runnable(target, rolls_back=True, captured=None)
    splits = (examined.tokens("train"), examined.tokens("held_out"))
    tokens = next((one for one in splits if not isinstance(one, str) and len(one)), ())
    prompts = sample_prompts(tokens, num_prompts=NUM_TEXTS, max_tokens=_MOST_PROMPT_TOKENS)
    if not prompts:
        why = f"no prompt of the run has at most {_MOST_PROMPT_TOKENS} tokens"
        return dataclasses.replace(figures, overfit=why)
    model = load_decoding_target(target)
    errors: tuple[LayerError, ...] = ()
    if stored.shortest is not None and stored.aux_layers is not None:
        errors = layer_errors(model, stored.shortest, stored.aux_layers)
    setup = examined.setup
    embedding = setup.draft.embed_tokens.weight.detach()
    if setup.draft.config.has_own_embedding:
        embedding = load_ends(locate(target), dtype=torch.float32)[0].to(embedding.device)
    ends = TargetEnds(embedding=embedding, lm_head=setup.target_lm_head)
    key = artifact_key("doctor-overfit")
    with (
        stage_progress("overfitting", key=key, total=MOST_STEPS, unit="steps") as bar,
        tempfile.TemporaryDirectory(prefix="eyas-doctor-") as folder,
    ):
        try:
            result = overfit_texts(
                model,
                ends,
                setup.draft.config,
                examined.run.training,
                prompts,
                stop_ids=conversation_tokenizer(target).stop_ids,
                folder=Path(folder),
                on_step=bar.move_to,
            )
        except ConfigError as error:
            return dataclasses.replace(figures, layer_errors=errors, overfit=str(error))
    return dataclasses.replace(figures, layer_errors=errors, overfit=result)
